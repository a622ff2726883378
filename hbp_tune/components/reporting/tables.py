"""The data and the plan as tables on a terminal."""

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hbp_tune.components.planning.metrics import PlanMetrics, measure
from hbp_tune.components.planning.records import EpochPlan

_BAR_WIDTH = 24


def print_plan(
    plan: EpochPlan,
    lengths: NDArray[np.int32],
    *,
    tokens_per_step: NDArray[np.int64],
    compared: Mapping[str, EpochPlan],
    console: Console | None = None,
) -> None:
    """Print what the data look like, the plan by group, and metrics beside one-length packing of the same data.

    Args:
        plan: of the first epoch.
        lengths: ``int32[num_samples]``, of all samples, overlong ones included.
        tokens_per_step: ``int64[num_steps]`` of ``plan``.
        compared: plans of the same samples by name, from `compare_with_naive`.
        console: where to print; the standard output by default.
    """
    console = console or Console()
    for table, note in (
        _lengths_table(lengths),
        _groups_table(plan, tokens_per_step),
        _metrics_table({name: measure(other) for name, other in compared.items()}),
    ):
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


def _groups_table(plan: EpochPlan, tokens_per_step: NDArray[np.int64]) -> tuple[Table, str]:
    table = Table(title=f"Plan: {plan.num_steps:,} optimizer steps an epoch on {plan.world_size} ranks")
    for name in ("group", "length", "CP", "AC", "samples", "packs", "steps", "micro", "tokens/step"):
        table.add_column(name, justify="left" if name == "group" else "right")
    docs_per_pack = np.diff(plan.pack_offsets)
    for index, group in enumerate(plan.groups):
        mine = plan.pack_group == index
        steps = np.unique(plan.pack_step[mine])
        micro_steps = np.count_nonzero(mine & (plan.pack_first_rank == 0))
        table.add_row(
            group.name,
            f"{group.pack_len:,}",
            str(group.cp_degree),
            str(group.ac_layers),
            f"{int(docs_per_pack[mine].sum()):,}",
            f"{np.count_nonzero(docs_per_pack[mine]):,}",
            f"{len(steps):,}",
            f"{micro_steps / len(steps):.1f}" if len(steps) else "-",
            f"{int(tokens_per_step[steps].mean()):,}" if len(steps) else "-",
        )
    left_out = [f"{len(ids):,} {what}" for what, ids in (("dropped", plan.dropped), ("truncated", plan.truncated)) if len(ids)]
    placed = ", ".join([f"{len(plan.sample_ids):,} samples placed, each once", *left_out])
    return table, f"{placed}\n  CP: ranks that share a pack  AC: recomputed layers  micro: micro-steps a step"


def _metrics_table(rows: Mapping[str, PlanMetrics]) -> tuple[Table, str]:
    table = Table(title="Balance (0 is perfect, but for Ave-T)")
    for name in ("packing", "DBR", "PR", "ABR", "CR", "Ave-T"):
        table.add_column(name, justify="left" if name == "packing" else "right")
    for name, metrics in rows.items():
        ratios = (metrics.dbr, metrics.pr, metrics.abr, metrics.cr)
        table.add_row(name, *(f"{ratio:.4f}" for ratio in ratios), f"{metrics.ave_t:,.0f}")
    return (
        table,
        "DBR, ABR: share of idle time by tokens, by attention  PR: padding\n  CR: tokens that pay CP  Ave-T: tokens per rank",
    )
