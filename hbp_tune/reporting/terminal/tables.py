"""The data and the plan as tables on a terminal."""

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hbp_tune.planning.comparison.metrics import PlanMetrics, measure
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.plans.records import EpochPlan
from hbp_tune.reporting.formats import time_unit

_BAR_WIDTH = 24
# Beside the number of recomputed layers, where their mode is not the usual one.
_MODE_LETTERS = {"selective": "s", "offload": "o"}


def print_plan(
    plan: EpochPlan,
    lengths: NDArray[np.int32],
    *,
    compared: Mapping[str, EpochPlan],
    cost: CostModel | None = None,
    console: Console | None = None,
) -> None:
    """Print what the data look like, the plan by group, and metrics beside one-length packing of the same data.

    Args:
        plan: of the first epoch.
        lengths: ``int32[num_samples]``, of all samples, overlong ones included.
        compared: plans of the same samples on as many ranks as each other, by name.
        cost: of the model that is trained; Llama 3.1 8B by default.
        console: where to print; the standard output by default.
    """
    console = console or Console()
    print_lengths(lengths, console)
    print_groups(plan, console)
    cost = cost or CostModel()
    ranks = next(iter(compared.values())).world_size
    print_metrics(
        {name: measure(other, cost) for name, other in compared.items()}, console, ranks=ranks, machine=cost.rates.machine
    )


def print_lengths(lengths: NDArray[np.int32], console: Console) -> None:
    """Print what the data look like; ``lengths`` is ``int32[num_samples]``, of all samples."""
    _print(console, _lengths_table(lengths))


def print_groups(plan: EpochPlan, console: Console) -> None:
    """Print the plan by group."""
    _print(console, _groups_table(plan))


def print_metrics(rows: Mapping[str, PlanMetrics], console: Console, *, ranks: int, machine: str) -> None:
    """Print the paper's metrics of plans by name, then what they mean in modelled cost and time; the first is ours."""
    _print(console, _metrics_table(rows, ranks))
    _print(console, _cost_table(rows, ranks, machine))


def _print(console: Console, table_and_note: tuple[Table, str]) -> None:
    table, note = table_and_note
    console.print(table)
    console.print(f"  {note}\n", highlight=False)


def _lengths_table(lengths: NDArray[np.int32]) -> tuple[Table, str]:
    table = Table(title=f"Data: {len(lengths):,} samples, {int(lengths.sum(dtype=np.int64)):,} tokens")
    for name in ("length", "samples", "share of tokens"):
        table.add_column(name, justify="left" if name == "share of tokens" else "right")
    borders = [0, *(2**power for power in range(7, 41) if 2**power < lengths.max()), int(lengths.max())]
    total = lengths.sum(dtype=np.int64)
    for low, high in itertools.pairwise(borders):
        inside = lengths[(lengths > low) & (lengths <= high)]
        share = inside.sum(dtype=np.int64) / total
        table.add_row(f"to {high:,}", f"{len(inside):,}", f"{'█' * round(share * _BAR_WIDTH):<{_BAR_WIDTH}} {share:.3f}")
    quantiles = np.quantile(lengths, (0.0, 0.5, 0.9, 0.99, 1.0), method="lower")
    return table, "min {:,}  median {:,}  p90 {:,}  p99 {:,}  max {:,} tokens".format(*quantiles)


def _groups_table(plan: EpochPlan) -> tuple[Table, str]:
    table = Table(title=f"Plan: {plan.num_steps:,} optimizer steps an epoch on {plan.world_size} ranks")
    for name in ("group", "length", "CP", "AC", "samples", "packs", "steps", "micro", "tokens\n/step"):
        table.add_column(name, justify="left" if name == "group" else "right")
    docs_per_pack, tokens_per_step = np.diff(plan.pack_offsets), plan.step_tokens
    for index, group in enumerate(plan.groups):
        mine = plan.pack_group == index
        steps = np.unique(plan.pack_step[mine])
        micro_steps = np.count_nonzero(mine & (plan.pack_first_rank == 0))
        table.add_row(
            group.name,
            f"{group.pack_len:,}",
            str(group.cp_degree),
            f"{group.ac_layers}{_MODE_LETTERS.get(group.ac_mode, '') if group.ac_layers else ''}",
            f"{int(docs_per_pack[mine].sum()):,}",
            f"{np.count_nonzero(docs_per_pack[mine]):,}",
            f"{len(steps):,}",
            f"{micro_steps / len(steps):.1f}" if len(steps) else "-",
            f"{int(tokens_per_step[steps].mean()):,}" if len(steps) else "-",
        )
    left_out = [f"{len(ids):,} {what}" for what, ids in (("dropped", plan.dropped), ("truncated", plan.truncated)) if len(ids)]
    num_placed, num_different = len(plan.sample_ids), len(np.unique(plan.sample_ids))
    often = "each once" if num_placed == num_different else f"{num_different:,} different ones"
    placed = ", ".join([f"{num_placed:,} samples placed, {often}", *left_out])
    shown = {group.ac_mode for group in plan.groups if group.ac_layers}
    modes = "".join(f" ({letter}: {mode})" for mode, letter in _MODE_LETTERS.items() if mode in shown)
    return table, f"{placed}\n  CP: ranks that share a pack  AC: recomputed layers{modes}  micro: micro-steps a step"


def _metrics_table(rows: Mapping[str, PlanMetrics], ranks: int) -> tuple[Table, str]:
    table = Table(title=f"Balance on {ranks} ranks (0 is perfect, but for Ave-T)")
    for name in ("packing", "DBR", "PR", "ABR", "CR", "Ave-T"):
        table.add_column(name, justify="left" if name == "packing" else "right")
    for name, metrics in rows.items():
        ratios = (metrics.dbr, metrics.pr, metrics.abr, metrics.cr)
        table.add_row(name, *(f"{ratio:.4f}" for ratio in ratios), f"{metrics.ave_t:,.0f}")
    return (
        table,
        "DBR, ABR: share of idle time by tokens, by attention  PR: padding\n  CR: tokens that pay CP  Ave-T: tokens per rank",
    )


def _cost_table(rows: Mapping[str, PlanMetrics], ranks: int, machine: str) -> tuple[Table, str]:
    table = Table(title=f"Modelled cost and time on {ranks} {machine}s")
    for name in ("packing", "CBR", "idle", "p99", "div.", "epoch", "x"):
        table.add_column(name, justify="left" if name == "packing" else "right")
    own_s = next(iter(rows.values())).epoch_s
    for name, metrics in rows.items():
        ratios = (metrics.cbr, metrics.idle, metrics.p99_imbalance)
        scale, unit, _ = time_unit(metrics.epoch_s)
        table.add_row(
            name,
            *(f"{ratio:.4f}" for ratio in ratios),
            f"{metrics.diversity:.2f}",
            f"{metrics.epoch_s / scale:,.1f} {unit}",
            f"{metrics.epoch_s / own_s:.2f}",
        )
    return (
        table,
        "CBR: share of idle time by cost  idle: the same over the epoch\n  p99: of the worst steps  "
        "div.: diversity, 1 is as mixed as random steps\n  x: time over the first row's",
    )
