"""The planning tables of the HBP paper beside ours, as markdown: packers at 128K, components, mixtures, and the goals.

python benchmarks/paper_tables.py > tables.md
python benchmarks/paper_tables.py --lengths lengths.csv.gz --column n_tokens
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_tune.data.store.lengths import read_lengths
from hbp_tune.planning.comparison.distributions import synthetic_lengths
from hbp_tune.planning.comparison.methods import BASELINE_NAMES, plan_baseline
from hbp_tune.planning.comparison.metrics import PlanMetrics, diversity_by_group, measure
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup

LONG = PackingGroup(name="long", pack_len=131072, cp_degree=8, ac_layers=29)
GROUPS = (PackingGroup(name="short", pack_len=16384, ac_layers=28), LONG)
COST = CostModel()
# HBP paper, 128K, 32 GPUs: DBR, ABR, PR, GPU days.
PACKERS = {
    "none": (0.63, 0.72, 0.0, 38.3),
    "random": (0.0, 0.53, 0.03, 5.57),
    "next_fit": None,
    "isf": (0.0, 0.506, 0.01, 5.22),
    "first_fit_shuffle": (0.0, 0.508, 0.01, 5.24),
    "first_fit_decreasing": (0.0, 0.515, 0.01, 5.48),
    "best_fit_shuffle": (0.0, 0.508, 0.01, 5.24),
    "best_fit_decreasing": None,
    "spfhp": (0.0, 0.512, 0.01, 5.40),
    "longalign_packing": (None, None, None, 5.4),
    "longalign_sorted": (None, None, None, 33.3),
}
Lengths = NDArray[np.int32]
Classes = NDArray[np.int16] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="a file of lengths in place of the mixtures")
    parser.add_argument("--column", help="of the file")
    arguments = parser.parse_args()
    if arguments.lengths:
        lengths, classes = read_lengths(arguments.lengths, arguments.column)
        everything(f"{len(lengths):,} samples of {arguments.lengths.name}", np.minimum(lengths, LONG.pack_len), classes)
        return
    lengths, classes = synthetic_lengths("tulu3_longcite")
    everything("Tulu 3 + LongCite", lengths, classes)
    mixtures()


def everything(title: str, lengths: Lengths, classes: Classes) -> None:
    print(f"## {title}: {len(lengths):,} samples, {int(lengths.sum(dtype=np.int64)):,} tokens\n")
    packers(lengths, classes)
    components(lengths, classes)
    modes(lengths, classes)


def row(*cells: Any) -> None:
    print("| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |")


def head(*names: str) -> None:
    row(*names)
    row(*("---" for _ in names))


def days(metrics: PlanMetrics, world_size: int) -> str:
    return f"{metrics.epoch_s * world_size / 86400:.2f}"


def packers(lengths: Lengths, classes: Classes) -> None:
    print("### Packing to 128K, cp 8, 32 GPUs (4 replicas); paper's figure in brackets\n")
    head("packer", "DBR", "ABR", "PR", "CBR", "idle", "modelled GPU days", "relative to isf (paper)")
    base = measure(plan_baseline("isf", lengths, LONG, world_size=32, seed=0), COST, classes).epoch_s
    for name in BASELINE_NAMES:
        metrics = measure(plan_baseline(name, lengths, LONG, world_size=32, seed=0), COST, classes)
        dbr, abr, pr, paper_days = PACKERS[name] or (None,) * 4
        relative = f"{metrics.epoch_s / base:.2f}" + (f" ({paper_days / 5.22:.2f})" if paper_days else "")
        row(
            name,
            *(
                f"{value:.4f}" + ("" if theirs is None else f" ({theirs})")
                for value, theirs in ((metrics.dbr, dbr), (metrics.abr, abr), (metrics.pr, pr))
            ),
            f"{metrics.cbr:.4f}",
            f"{metrics.idle:.4f}",
            days(metrics, 32),
            relative,
        )
    print()


def components(lengths: Lengths, classes: Classes) -> None:
    print("### Components, 32 GPUs; paper's figure in brackets\n")
    plans = {
        "naive (isf to 128K)": (plan_baseline("isf", lengths, LONG, world_size=32, seed=0), 0.506, 1.0, 5.22),
        "hierarchical": (plan(lengths, 32, mode="paper", sort_by=None), 0.288, 0.173, 4.51),
        "+ balance (paper mode)": (plan(lengths, 32, mode="paper"), 0.002, 0.173, 3.73),
        "+ balance by cost": (plan(lengths, 32, mode="paper", sort_by="cost"), None, None, None),
        "cost mode": (plan(lengths, 32, mode="cost"), None, None, None),
    }
    head("plan", "ABR", "CR", "DBR", "PR", "pr_tail", "CBR", "idle", "GPU days", "speed-up (paper)")
    base = None
    for name, (planned, abr, cr, paper_days) in plans.items():
        metrics = measure(planned, COST, classes)
        base = base or metrics.epoch_s
        row(
            name,
            f"{metrics.abr:.4f}" + ("" if abr is None else f" ({abr})"),
            f"{metrics.cr:.4f}" + ("" if cr is None else f" ({cr})"),
            *(f"{value:.5f}" for value in (metrics.dbr, metrics.pr, metrics.pr_tail, metrics.cbr, metrics.idle)),
            days(metrics, 32),
            f"{base / metrics.epoch_s:.2f}" + ("" if paper_days is None else f" ({5.22 / paper_days:.2f})"),
        )
    print()


def modes(lengths: Lengths, classes: Classes) -> None:
    print("### Both modes beside the rest, by GPUs\n")
    head("GPUs", "plan", "CBR", "idle", "p99", "diversity of short steps", "CR", "ABR", "least/mean cost of a short step",
         "modelled epoch", "share of the bound")  # fmt: skip
    for world_size in (8, 32, 256, 1024):
        if len(lengths) < 100_000 and world_size > 256:
            continue
        naive = plan_baseline("isf", lengths, LONG, world_size=world_size, seed=0)
        for name, planned in (
            ("isf to 128K", naive),
            ("sorted batching", plan_baseline("longalign_sorted", lengths, LONG, world_size=world_size, seed=0)),
            ("paper mode", plan(lengths, world_size, mode="paper")),
            ("cost mode", plan(lengths, world_size, mode="cost")),
        ):
            metrics = measure(planned, COST, classes)
            row(
                world_size,
                name,
                f"{metrics.cbr:.5f}",
                f"{metrics.idle:.5f}",
                f"{metrics.p99_imbalance:.4f}",
                f"{diversity_by_group(planned, classes)[0]:.2f}",
                f"{metrics.cr:.4f}",
                f"{metrics.abr:.4f}",
                f"{_least_step(planned):.3f}",
                f"{metrics.epoch_s / 3600:.3f} h",
                f"{_bound_s(planned) / metrics.epoch_s:.3f}",
            )
    print()


def mixtures() -> None:
    print("## Other mixtures, paper mode, 32 GPUs: ABR after balancing\n")
    head("mixture", "groups: length (cp)", "ABR", "paper", "DBR", "PR", "cost mode: CBR", "p99", "CR")
    short, long = GROUPS
    smallest = PackingGroup(name="4K", pack_len=4096)
    medium = PackingGroup(name="32K", pack_len=32768, cp_degree=8)
    for name, groups, paper in (
        ("tulu3", (short, medium), 0.001),
        ("tulu3", (smallest, short, medium), 0.001),
        ("openhermes", (short,), 0.001),
        ("openhermes", (smallest, PackingGroup(name="8K", pack_len=8192)), 0.001),
        ("tulu3_longcite", (short, long), 0.002),
        ("openhermes_longcite", (short, long), 0.004),
        ("tulu3_longwriter", (short, long), 0.003),
    ):
        lengths, classes = synthetic_lengths(name)
        paper_mode = measure(plan(lengths, 32, mode="paper", groups=groups), COST, classes)
        cost_mode = measure(plan(lengths, 32, mode="cost", groups=groups), COST, classes)
        row(
            name,
            ", ".join(f"{group.pack_len // 1024}K ({group.cp_degree})" for group in groups),
            f"{paper_mode.abr:.4f}",
            paper,
            f"{paper_mode.dbr:.5f}",
            f"{paper_mode.pr:.5f}",
            f"{cost_mode.cbr:.5f}",
            f"{cost_mode.p99_imbalance:.4f}",
            f"{cost_mode.cr:.4f}",
        )
    print()


def plan(lengths: Lengths, world_size: int, *, groups: Sequence[PackingGroup] = GROUPS, **settings: Any) -> EpochPlan:
    return BalancePlanner(**settings).plan(lengths, lengths, groups, world_size=world_size, seed=0)


def _bound_s(planned: EpochPlan) -> float:
    """Modelled seconds of the same samples with perfect balance, the short group's recomputation and no communication."""
    tokens, squares = (np.array([np.sum(planned.lengths.astype(np.int64) ** power)]) for power in (1, 2))
    alone = COST.pack_seconds(tokens, squares, np.array([1]), np.array([GROUPS[0].ac_layers]))
    return float(alone.total[0]) / planned.world_size


def _least_step(planned: EpochPlan) -> float:
    """The cheapest step of the shortest group, over the mean: 1 where no step is partial."""
    cost = np.bincount(planned.pack_step, weights=planned.sum_per_pack(COST.sample_cost(planned.lengths)))
    short = cost[planned.pack_group[np.searchsorted(planned.pack_step, np.arange(planned.num_steps))] == 0]
    return float(short.min() / short.mean())


if __name__ == "__main__":
    main()
