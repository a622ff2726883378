"""The HBP paper's timings, recomputed layers, groups and speed-ups beside the cost model's, as markdown.

    python benchmarks/paper_groups.py > groups.md       # a minute on one core

Nothing here is measured by us: the paper's figures are of H100 GPUs with its authors' software, ours are modelled.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from paper_tables import COST, GROUPS, LONG, Lengths, head, plan, row

from hbp_tune.planning.comparison.assignments import assign_epoch, flexsp
from hbp_tune.planning.comparison.distributions import synthetic_lengths
from hbp_tune.planning.comparison.methods import plan_baseline
from hbp_tune.planning.comparison.selection import GroupSelector, candidate_groups, paper_rule
from hbp_tune.planning.comparison.simulation import SHARES, PackWork, Simulation, simulate
from hbp_tune.planning.costs.cost import LLAMA3_1_8B, CostModel, ModelShape
from hbp_tune.planning.costs.exchange import AttentionHeads
from hbp_tune.planning.costs.fitting import FittedRates, MemoryLine, fit_rates, predict_s
from hbp_tune.planning.costs.hardware import H100, Rates
from hbp_tune.planning.costs.measurements import Measurement
from hbp_tune.planning.costs.memory import LLAMA3_1_8B_DECODER, MemoryModel, layer_activations
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from hbp_tune.reporting.terminal.choice import describe_set

Errors = NDArray[np.float64]
TOKENS_PER_RANK = 16_384
WORLD_SIZE = 32
BUDGET_GIB = 79.0
# Length, CP degree, recomputed layers, seconds an iteration. Full-length documents, then "at equal tokens per device".
FULL = [
    (32, 2, 28, 4.45),
    (32, 4, 23, 4.35),
    (32, 8, 8, 4.12),
    (64, 4, 28, 6.3),
    (64, 8, 24, 6.2),
    (128, 8, 29, 10.2),
    (128, 16, 23, 10.5),
]
MIXED = [(8, 2, 8, 2.69), (16, 1, 28, 2.65), (32, 8, 8, 2.83), (64, 4, 28, 3.01), (128, 8, 28, 3.05)]
# What the documents of the rows "at equal tokens" may be, the same in all of them: the paper does not say.
DOC_LENS = (1024, 2048, 4096, 8192)
# Both of the paper's rows that ran out of memory, with all 32 layers recomputed.
OUT_OF_MEMORY = [(64, 2), (128, 4)]
# FlexSP divides batch by batch, in Python.
_SHARED_OUT_BY = 4
# Weights that one token uses; latent attention, run as 128 heads of 192 (queries, keys) and 128 (values), which Ulysses sends.
# Routed experts stay where they are (expert parallelism, whose own exchange is left out): 13 of 236 billion weights are gathered.
DEEPSEEK_V2 = ModelShape(
    num_layers=60,
    linear_params=21_000_000_000,
    attention_dim=128 * 160,
    heads=AttentionHeads(query=128, kv=128),
    head_params=102_400 * 5120,
    gathered_params=13_000_000_000,
)
LLAMA3_1_70B = ModelShape(
    num_layers=80,
    linear_params=70_553_706_496 - 128_256 * 8192,
    attention_dim=8192,
    heads=AttentionHeads(query=64, kv=8),
    head_params=128_256 * 8192,
    gathered_params=70_553_706_496,
)


def main() -> None:
    lengths, _ = synthetic_lengths("tulu3_longcite")
    timings()
    layers()
    choice(lengths)
    speed_ups(lengths)
    deepseek()


def measurement(case: tuple[int, int, int, float], doc_len: int) -> Measurement:
    """Turn an iteration of 16K tokens a rank into one pack of equal documents, as long as the pack where that is shorter."""
    length, cp_degree, ac_layers, iteration_s = case
    pack_len = 1024 * length
    group = PackingGroup(name=f"{length}K", pack_len=pack_len, cp_degree=cp_degree, ac_layers=ac_layers)
    return Measurement(
        group=group,
        world_size=WORLD_SIZE,
        doc_lens=(doc_len,) * (pack_len // doc_len),
        micro_step_s=iteration_s * pack_len / (cp_degree * TOKENS_PER_RANK),
        peak_gib=BUDGET_GIB,
    )


def measurements(doc_len: int) -> list[Measurement]:
    """Give all twelve rows: documents as long as the packs, then documents of ``doc_len``."""
    return [measurement(case, 1024 * case[0]) for case in FULL] + [measurement(case, doc_len) for case in MIXED]


def fit_rows(rows: slice) -> tuple[int, FittedRates]:
    """Fit rates to some rows, with the documents that explain these best."""
    fits = {doc_len: fit_rates(LLAMA3_1_8B, measurements(doc_len)[rows], without_gathering(H100)) for doc_len in DOC_LENS}
    return min(fits.items(), key=lambda pair: pair[1].rms_error)


def without_gathering(rates: Rates) -> Rates:
    """Leave gathering out: the paper does not say whether its iterations of several packs gather once or several times."""
    return replace(rates, gather_network_bytes_per_s=float("inf"))


def errors(rates: Rates, doc_len: int) -> Errors:
    """Give ``float64[12]``: modelled over the paper's seconds, less 1."""
    model = CostModel(LLAMA3_1_8B, without_gathering(rates))
    return np.array([predict_s(model, one) / (one.micro_step_s or 1) - 1 for one in measurements(doc_len)])


def timings() -> None:
    halves = {"all rows": slice(None), "odd rows": slice(0, None, 2), "even rows": slice(1, None, 2)}
    others = {"all rows": halves["all rows"], "odd rows": halves["even rows"], "even rows": halves["odd rows"]}
    fits = {name: fit_rows(rows) for name, rows in halves.items()}
    doc_len = fits["all rows"][0]
    off = {"default rates": errors(H100, doc_len)}
    off |= {f"fitted to {name}": errors(fit.rates, chosen) for name, (chosen, fit) in fits.items()}
    print("## Seconds of an iteration, Llama 3.1 8B, 16K tokens a rank (H100; paper, and modelled with its error)\n")
    head("row", "length", "CP", "AC", "documents", "paper", *off)
    for index, case in enumerate(FULL + MIXED):
        documents = "full length" if index < len(FULL) else "equal tokens"
        modelled = (f"{case[3] * (1 + error[index]):.2f} ({error[index]:+.1%})" for error in off.values())
        row(index + 1, f"{case[0]}K", case[1], case[2], documents, case[3], *modelled)
    print()
    units = ("linear TFLOP/s", "attention TFLOP/s", "exchange GB/s", "across nodes GB/s", "fixed s")
    head("rates", "documents of rows 8 to 12", *units, "rms error of its rows", "largest error of the other rows")
    row("default", f"{doc_len:,}", *_rates(H100), f"{np.sqrt(np.mean(off['default rates'] ** 2)):.1%}", "-")
    for name, (chosen, fit) in fits.items():
        largest = np.abs(off[f"fitted to {name}"][others[name]]).max()
        row(f"fitted to {name}", f"{chosen:,}", *_rates(fit.rates), f"{fit.rms_error:.1%}", f"{largest:.1%}")
    print()
    head("documents of rows 8 to 12", "rms error of rows 8 to 12, fitted alone", "of all rows")
    for length in DOC_LENS:
        alone, together = (
            fit_rates(LLAMA3_1_8B, measurements(length)[first:], without_gathering(H100)) for first in (len(FULL), 0)
        )
        row(f"{length:,}", f"{alone.rms_error:.1%}", f"{together.rms_error:.1%}")
    print()


def _rates(rates: Rates) -> list[str]:
    flops = (rates.token_flops_per_s, rates.square_flops_per_s)
    moved = (rates.exchange_bytes_per_s, rates.network_bytes_per_s)
    return [
        *(f"{x / 1e12:.0f}" for x in flops),
        *(f"{x / 1e9:.1f}" for x in moved),
        f"{CostModel(LLAMA3_1_8B, rates).micro_step_s:.3f}",
    ]


def layers() -> None:
    counted = MemoryModel(LLAMA3_1_8B_DECODER, world_size=WORLD_SIZE, accumulation="sharded")
    lines = {"all rows": fit_line(FULL), "odd rows": fit_line(FULL[::2]), "even rows": fit_line(FULL[1::2])}
    print(f"## Fewest recomputed layers of 32 that fit {BUDGET_GIB:g} GiB\n")
    head("length", "CP", "paper", "counted model of this package", *(f"line fitted to {name}" for name in lines))
    for length, cp_degree, ac_layers in (*(case[:3] for case in FULL), *((*case, "over memory") for case in OUT_OF_MEMORY)):
        group = PackingGroup(name="g", pack_len=1024 * int(length), cp_degree=int(cp_degree))
        models: list[MemoryLine | MemoryModel] = [counted, *lines.values()]
        fewest = [model.fewest_ac_layers(group, BUDGET_GIB) for model in models]
        row(f"{length}K", cp_degree, ac_layers, *("over memory" if layers is None else layers for layers in fewest))
    print()
    head("line fitted to", "fixed GiB", "KiB per token of a kept layer", "of a recomputed layer")
    for name, line in lines.items():
        row(name, f"{line.fixed_gib:.0f}", f"{line.kept_gib * 2**20:.0f}", f"{line.recomputed_gib * 2**20:.0f}")
    print()


def fit_line(cases: Sequence[tuple[int, int, int, float]]) -> MemoryLine:
    """Find the memory line whose fewest layers are nearest to the paper's, and that has no room for what ran out of memory.

    Every row's peak is about the same budget, so that least squares of peaks would find a constant: layers are compared instead,
    on a grid, and of equal lines the mean is taken. They leave the line's scale free; a layer that keeps its activations has what
    the counted model says.
    """
    layer = layer_activations(LLAMA3_1_8B_DECODER, LONG)
    kept = (layer.attention + layer.mlp) / 2**30
    recomputed, fixed = np.meshgrid(np.arange(8, 61) / 2**20, np.arange(20, 76, 0.5), indexing="ij")
    miss = np.zeros_like(fixed)
    for length, cp_degree, ac_layers, _ in cases:
        tokens = 1024 * length / cp_degree
        fewest = np.ceil((fixed + 32 * tokens * kept - BUDGET_GIB) / (tokens * (kept - recomputed)))
        miss += np.abs(np.clip(fewest, 0, 33) - ac_layers)
    for length, cp_degree in OUT_OF_MEMORY:
        miss += np.where(fixed + 32 * 1024 * length / cp_degree * recomputed <= BUDGET_GIB, 100.0, 0.0)
    best = miss == miss.min()
    return MemoryLine(
        num_layers=32, fixed_gib=float(fixed[best].mean()), kept_gib=kept, recomputed_gib=float(recomputed[best].mean())
    )


def choice(lengths: Lengths) -> None:
    """Choose groups from the model alone, by the paper's rule and by the modelled time of the whole plan."""
    memories: dict[str, MemoryLine | MemoryModel] = {
        "line fitted to the paper's layers": fit_line(FULL),
        "counted model of this package": MemoryModel(LLAMA3_1_8B_DECODER, world_size=WORLD_SIZE, accumulation="sharded"),
    }
    selector = GroupSelector(lengths, planner=BalancePlanner(), cost=COST, world_size=WORLD_SIZE)
    fastest = {}
    print("## Groups for Llama 3.1 8B on 32 H100s of 80 GB, from the model alone: length / CP / recomputed layers\n")
    head("memory", "paper's rule", "epoch, GPU days", "by the time of the whole plan", "epoch, GPU days")
    for name, memory in memories.items():
        fewest = partial(memory.fewest_ac_layers, budget_gib=BUDGET_GIB)
        candidates = candidate_groups(LONG.pack_len, fewest, world_size=WORLD_SIZE, max_cp_degree=16)
        timed = [(group, _iteration_s(group)) for group in candidates if group.pack_len >= 1024 * MIXED[0][0]]
        fastest[name] = {group.name: (group, s) for group, s in sorted(timed, key=lambda pair: -pair[1])}
        by_rule, chosen = paper_rule(timed, fewest), selector.select(candidates)
        seconds = (selector.epoch_s(by_rule), chosen.epoch_s)
        days = [f"{epoch_s * WORLD_SIZE / 86_400:.2f}" for epoch_s in seconds]
        row(name, describe_set(by_rule), days[0], describe_set(chosen.groups), days[1])
    days_of_paper = selector.epoch_s(GROUPS) * WORLD_SIZE / 86_400
    row("as the paper has it", describe_set(GROUPS), f"{days_of_paper:.2f}", "-", "-")
    print("\nFastest strategy of each length at equal tokens, seconds of an iteration:\n")
    head("length", "paper", *fastest)
    for length, cp_degree, ac_layers, iteration_s in MIXED:
        best = [by_name[f"{length}K"] for by_name in fastest.values()]
        row(f"{length}K", f"{cp_degree}/{ac_layers}, {iteration_s}", *(f"{g.cp_degree}/{g.ac_layers}, {s:.2f}" for g, s in best))
    print()


def _iteration_s(group: PackingGroup) -> float:
    """Model the seconds of 16K tokens a rank, in documents of 4K."""
    one = measurement((group.pack_len // 1024, group.cp_degree, group.ac_layers, 1.0), 4096)
    return predict_s(CostModel(LLAMA3_1_8B, without_gathering(H100)), one) / (one.micro_step_s or 1)


def speed_ups(lengths: Lengths) -> None:
    manual = (PackingGroup(name="short", pack_len=32_768, cp_degree=2, ac_layers=28), LONG)
    isf = baseline(lengths, "isf")
    some = lengths[::_SHARED_OUT_BY]
    shared_out = assign_epoch(some, flexsp(LONG), tokens_per_step=524_288, world_size=WORLD_SIZE, cost=COST)
    rows = {
        "naive (isf to 128K)": (isf, 5.22),
        "hierarchical": (plan(lengths, WORLD_SIZE, mode="paper", sort_by=None), 4.51),
        "+ balance": (plan(lengths, WORLD_SIZE, mode="paper"), 3.73),
        "+ balance, manual groups": (plan(lengths, WORLD_SIZE, groups=manual, mode="paper"), 4.25),
        "cost mode": (plan(lengths, WORLD_SIZE, mode="cost"), None),
        "no packing": (baseline(lengths, "none"), 38.3),
        "longalign_packing": (baseline(lengths, "longalign_packing"), 5.4),
        "longalign_sorted": (baseline(lengths, "longalign_sorted"), 33.3),
    }
    works = {name: (PackWork.of_plan(planned), days) for name, (planned, days) in rows.items()}
    print("## Speed-ups over naive packing, Llama 3.1 8B on 32 GPUs\n")
    head("plan", "modelled", "paper", "error", "paper's GPU days", *SHARES)
    base = simulate(works["naive (isf to 128K)"][0], COST)
    for name, (work, days) in works.items():
        _speed_up(name, simulate(work, COST), base, days)
    some_isf = simulate(PackWork.of_plan(baseline(some, "isf")), COST)
    _speed_up(f"flexsp (1 of {_SHARED_OUT_BY} samples)", simulate(shared_out, COST), some_isf, 4.35)
    print()
    larger(lengths)


def baseline(lengths: Lengths, name: str, group: PackingGroup = LONG) -> EpochPlan:
    return plan_baseline(name, lengths, group, world_size=WORLD_SIZE, seed=0)


def _speed_up(name: str, simulated: Simulation, base: Simulation, days: float | None) -> None:
    ratio, paper = base.epoch_s / simulated.epoch_s, 5.22 / days if days else None
    theirs = ("-", "-") if paper is None else (f"{paper:.3f}", f"{ratio / paper - 1:+.1%}")
    row(name, f"{ratio:.3f}", *theirs, days, *(f"{simulated.shares[part]:.0%}" for part in SHARES))


def larger(lengths: Lengths) -> None:
    print("## Speed-ups over naive packing, Llama 3.1 70B on 32 GPUs, all layers recomputed (paper: 1.33, with balance 1.43)\n")
    head("CP of 128K", "hierarchical", "+ balance", "exchange of naive", "idle of naive")
    cost = CostModel(LLAMA3_1_70B)
    for cp_degree in (8, 16, 32):
        groups = tuple(replace(group, ac_layers=80) for group in (GROUPS[0], replace(LONG, cp_degree=cp_degree)))
        plans = (
            baseline(lengths, "isf", groups[1]),
            plan(lengths, WORLD_SIZE, groups=groups, mode="paper", sort_by=None),
            plan(lengths, WORLD_SIZE, groups=groups, mode="paper"),
        )
        naive, *ours = (simulate(PackWork.of_plan(planned), cost) for planned in plans)
        ratios = [f"{naive.epoch_s / one.epoch_s:.2f}" for one in ours]
        row(cp_degree, *ratios, f"{naive.shares['exchange']:.0%}", f"{naive.shares['idle']:.0%}")
    print()


def deepseek() -> None:
    lengths, _ = synthetic_lengths("tulu3")
    cost = CostModel(DEEPSEEK_V2)
    naive = plan_baseline(
        "isf", lengths, PackingGroup(name="long", pack_len=32_768, cp_degree=8, ac_layers=60), world_size=256, seed=0
    )
    print("## DeepSeek-V2 on 256 H100 at 32K, Tulu 3, from the cost model alone (paper: 2.4)\n")
    head("short group", "speed-up")
    for pack_len in (2048, 4096, 8192):
        short = PackingGroup(name="short", pack_len=pack_len, ac_layers=60)
        long = PackingGroup(name="long", pack_len=32_768, cp_degree=8, ac_layers=60)
        balanced = plan(lengths, 256, groups=(short, long), mode="paper")
        seconds = [simulate(PackWork.of_plan(planned), cost).epoch_s for planned in (naive, balanced)]
        row(f"{pack_len // 1024}K, CP 1", f"{seconds[0] / seconds[1]:.2f}")
    print()


if __name__ == "__main__":
    assert GROUPS[1] is LONG
    main()
