"""Pictures of who waits for whom: the ranks' work in every micro-step, and the steps along the epoch."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hbp_tune.planning.comparison.simulation import PackWork, simulate
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.balancing import attention_work
from hbp_tune.planning.plans.records import EpochPlan
from hbp_tune.reporting.formats import time_unit, write_share, write_tokens
from hbp_tune.reporting.pages.charts import GRID, INK, MUTED, Axis, Chart, group_colour, linear_axis
from hbp_tune.reporting.pages.figures import NUM_BINS, Picture, groups_legend
from hbp_tune.reporting.report import PlanReport

# What a screen shows apart; of longer epochs it shows a sample or bins.
_MOST_MICRO_STEPS = 120
_MOST_BLOCKS = 480
_MOST_STEPS = 60
_MOST_NUMBERS = 20
_GOLDEN = 0.618034


class Spread(NamedTuple):
    """Least, mean and most over the ranks of each micro-step, ``float64[micro_steps]``."""

    low: NDArray[np.float64]
    mean: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroSteps:
    """What the ranks do in each micro-step, in training order; one value per micro-step.

    Args:
        group: index of the group.
        step: optimizer step.
        work: attention work of a rank, ``len ** 2`` of its documents over the ranks that share them.
        busy_s: modelled seconds that a rank computes and exchanges.
        duration_s: modelled seconds until the slowest rank is done and weights are gathered.
    """

    group: NDArray[np.int16]
    step: NDArray[np.int32]
    work: Spread
    busy_s: Spread
    duration_s: NDArray[np.float64]


def describe_micro_steps(plan: EpochPlan, cost: CostModel) -> MicroSteps:
    """Spread work and modelled time over the ranks of every micro-step."""
    starts = plan.micro_step_starts
    squares = plan.sum_per_pack(attention_work(plan.lengths))
    simulated = simulate(PackWork.of_plan(plan), cost)
    return MicroSteps(
        group=plan.pack_group[starts],
        step=plan.pack_step[starts],
        work=_spread(squares / plan.cp_degrees, starts),
        busy_s=_spread(simulated.busy_s, starts),
        duration_s=simulated.micro_step_s,
    )


def draw_busy(report: PlanReport, before: MicroSteps, after: MicroSteps) -> Picture:
    """Draw the modelled time that ranks are busy, in one-length packing and in the plan."""
    idle, naive_idle = write_share(report.metrics.idle), write_share(report.baselines["isf"].idle)
    return Picture(
        title=f"Ranks wait {idle} of the time, {naive_idle} in one-length packing",
        body=_before_and_after(report, before, after, [before.busy_s, after.busy_s], "modelled seconds per rank"),
        caption="Each bar is a micro-step, from the rank that is done first to the one that is done last; the dark line is the "
        f"mean. All wait for the last, so that long bars are lost time and flat ones good. Seconds are modelled for "
        f"{report.cost.rates.machine} GPUs: "
        "attention, all other layers, recomputation and exchange between the ranks of a pack."
        f"{_notes(report.naive, before, after)}",
    )


def draw_attention(report: PlanReport, before: MicroSteps, after: MicroSteps) -> Picture:
    """Draw the attention work of ranks, in one-length packing and in the plan."""
    own, naive = report.metrics, report.baselines["isf"]
    return Picture(
        title=f"Attention work is {write_share(own.abr)} out of balance, the whole work {write_share(own.cbr)}; "
        f"in one-length packing {write_share(naive.abr)} and {write_share(naive.cbr)}",
        body=_before_and_after(report, before, after, [before.work, after.work], "attention work per rank, tokens²"),
        caption="The part of the work that grows with the square of a sample's length, drawn as above: the sum of squared "
        "lengths in a pack over the ranks that share it. A plan may leave it uneven where it evens out the whole work, for which "
        f"ranks wait. Out of balance: mean share that ranks stay below the highest.{_notes(report.naive, before, after)}",
    )


def _before_and_after(report: PlanReport, before: MicroSteps, after: MicroSteps, spreads: list[Spread], label: str) -> str:
    plans = ((report.naive, before, "Before: one pack length"), (report.plan, after, "After: this plan"))
    top = 1.05 * max(float(spread.high.max()) for spread in spreads)
    parts = []
    for (plan, micro_steps, name), spread in zip(plans, spreads, strict=True):
        num = len(micro_steps.group)
        width = max(1.0, num / _MOST_MICRO_STEPS)
        slots = np.arange(round(num / width))
        # Not the first of each slot: groups alternate, and a regular choice could meet one group again and again.
        shown = ((slots + slots * _GOLDEN % 1) * width).astype(np.int64)
        left, right = (slots + 0.1) * width, (slots + 0.9) * width
        chart = Chart(
            linear_axis(0, num, "micro-step of the epoch", whole=True),
            linear_axis(0, top, label, ticks=5),
            label=f"{name}, {label}",
            height_px=150,
        )
        low, mean, high = (values[shown] for values in spread)
        is_flat = high - low < 0.02 * top
        for index in range(len(plan.groups)):
            mine = micro_steps.group[shown] == index
            colour = MUTED if plan is report.naive else group_colour(index)
            tall, flat = mine & ~is_flat, mine & is_flat
            chart.bars(left[tall], right[tall], low[tall], high[tall], colour, opacity=0.55, line=0.5)
            chart.dashes(left[flat], right[flat], mean[flat], colour, width=3)
        chart.dashes(left[~is_flat], right[~is_flat], mean[~is_flat], INK, width=1.5)
        parts.append(f"<h3>{name}</h3>{groups_legend(plan, naive=plan is report.naive)}{chart.html()}")
    return "".join(parts)


def draw_timeline(plan: EpochPlan, micro_steps: MicroSteps) -> Picture:
    """Draw which group the steps draw from along the modelled time of the epoch."""
    scale, _, unit = time_unit(float(micro_steps.duration_s.sum()))
    ends = np.cumsum(micro_steps.duration_s) / scale
    in_blocks = plan.num_steps <= _MOST_STEPS and len(ends) <= _MOST_BLOCKS
    is_numbered = plan.num_steps <= _MOST_NUMBERS and in_blocks
    lanes = [(index + 0.5, write_tokens(group.pack_len)) for index, group in enumerate(plan.groups)]
    chart = Chart(
        linear_axis(0, float(ends[-1]), f"modelled {unit} since the start of the epoch"),
        Axis(low=0, high=len(lanes) + (0.3 if is_numbered else 0), ticks=lanes, label="pack length of the group"),
        label="Time line of the epoch by group",
        height_px=46 * len(lanes) + 20,
    )
    if in_blocks:
        _draw_blocks(chart, micro_steps, np.concatenate(([0.0], ends)), is_numbered=is_numbered)
        how = "Each block is a micro-step" + (
            ", numbers are optimizer steps." if is_numbered else ", lines part optimizer steps."
        )
    else:
        _draw_bins(chart, micro_steps, np.concatenate(([0.0], ends)))
        how = f"The epoch in {NUM_BINS} equal pieces of time; the height of a bar is the share of its piece that the group takes."
    return Picture(
        title=_timeline_finding(plan, micro_steps),
        body=groups_legend(plan) + chart.html(),
        caption=f"{how} A step draws all its packs from one group; the order is the curriculum's.",
    )


def _draw_blocks(chart: Chart, micro_steps: MicroSteps, borders: NDArray[np.float64], *, is_numbered: bool) -> None:
    step_starts = borders[:-1][np.diff(micro_steps.step, prepend=-1) > 0]
    chart.verticals(step_starts, GRID)
    if is_numbered:
        for step, middle in enumerate((step_starts + np.append(step_starts[1:], borders[-1])) / 2):
            chart.note(middle, str(step))
    gaps = 0.06 * np.diff(borders)
    left, right = borders[:-1] + gaps, borders[1:] - gaps
    for index in np.unique(micro_steps.group):
        mine = micro_steps.group == index
        chart.bars(left[mine], right[mine], index + 0.15, index + 0.8, group_colour(index))


def _draw_bins(chart: Chart, micro_steps: MicroSteps, borders: NDArray[np.float64]) -> None:
    edges = np.linspace(0, borders[-1], NUM_BINS + 1)
    for index in np.unique(micro_steps.group):
        spent = np.concatenate(([0.0], np.cumsum(np.where(micro_steps.group == index, np.diff(borders), 0))))
        share = np.diff(np.interp(edges, borders, spent)) / edges[1]
        some = np.flatnonzero(share > 1e-9)
        chart.bars(edges[some], edges[some + 1], index + 0.1, index + 0.1 + 0.8 * share[some], group_colour(index))


def _timeline_finding(plan: EpochPlan, micro_steps: MicroSteps) -> str:
    longest = int(micro_steps.group.max())
    name = plan.groups[longest].name
    mine, num_steps = plan.step_groups == longest, f"{plan.num_steps:,} steps"
    if mine.all():
        return f"All {num_steps} draw from {name!r}" if plan.num_steps > 1 else f"The one step draws from {name!r}"
    share = write_share(micro_steps.duration_s[micro_steps.group == longest].sum() / micro_steps.duration_s.sum())
    return f"{name!r} takes {share} of the time: {np.count_nonzero(mine):,} of {num_steps}, from step {np.argmax(mine):,} on"


def _notes(naive: EpochPlan, *parts: MicroSteps) -> str:
    notes = []
    if naive.groups[-1].cp_degree == naive.world_size:
        notes.append(" In one-length packing all ranks share every pack, so that none has another to wait for.")
    if max(len(part.group) for part in parts) > _MOST_MICRO_STEPS:
        notes.append(f" {_MOST_MICRO_STEPS} micro-steps are shown, spread over the epoch.")
    return "".join(notes)


def _spread(values: NDArray[np.float64], starts: NDArray[np.int64]) -> Spread:
    num = np.diff(starts, append=len(values))
    return Spread(np.minimum.reduceat(values, starts), np.add.reduceat(values, starts) / num, np.maximum.reduceat(values, starts))
