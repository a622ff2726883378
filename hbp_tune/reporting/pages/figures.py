"""Pictures of the data and of a plan's packs and steps: each states its finding and is explained in one caption."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_tune.planning.plans.records import EpochPlan
from hbp_tune.reporting.formats import write_count, write_share, write_tokens
from hbp_tune.reporting.pages.charts import BARS, INK, MUTED, Axis, Chart, group_colour, legend, linear_axis

# Longer epochs are shown in this many bins, so that a page stays small whatever the data.
NUM_BINS = 120
_MOST_POINTS = 300
_MOST_LARGE_POINTS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A finding, its picture as HTML, and how to read it; title and caption are plain text."""

    title: str
    body: str
    caption: str


def draw_lengths(lengths: NDArray[np.int32], plan: EpochPlan) -> Picture:
    """Draw the histogram of lengths: samples, and the tokens in them."""
    # Bin k holds lengths over 2 ** ((k - 1) / 2) up to 2 ** (k / 2), so that powers of two are borders, as with most groups.
    bins = np.ceil(2 * np.log2(lengths)).astype(np.int64)
    first = int(bins.min())
    num_samples = np.bincount(bins - first)
    samples, tokens = num_samples / len(lengths), np.bincount(bins - first, weights=lengths) / lengths.sum(dtype=np.int64)
    right = np.arange(first, first + len(samples)) / 2
    chart = Chart(
        _octaves(float(right[0]) - 0.5, float(right[-1])),
        linear_axis(0, 1.12 * max(samples.max(), tokens.max()), "share of all samples, of all tokens", text="{:.0%}".format),
        label="Histogram of sample lengths",
    )
    low = chart.x.low
    for index, group in enumerate(plan.groups):
        border = float(np.log2(group.pack_len))
        high = min(border, chart.x.high)
        if high > low:
            chart.bars(low, high, 0, chart.y.high, group_colour(index), opacity=0.07, line=0)
            low = high
        if chart.x.low <= border <= chart.x.high:
            chart.verticals(border, group_colour(index), width=1.5, dots="4 3")
    some = np.flatnonzero(num_samples)
    tips = [
        f"{int(2 ** (right[k] - 0.5)) + 1:,} to {int(2 ** right[k]):,} tokens: {write_count(int(num_samples[k]), 'sample')}, "
        f"{write_share(samples[k])} of all, with {write_share(tokens[k])} of the tokens"
        for k in some
    ]
    chart.bars(right[some] - 0.46, right[some] - 0.25, 0, samples[some], BARS, tips=tips)
    chart.bars(right[some] - 0.25, right[some] - 0.04, 0, tokens[some], INK, tips=tips)
    borders = [(group_colour(i), f"{group.name}: packs of {group.pack_len:,}") for i, group in enumerate(plan.groups)]
    quantiles = np.quantile(lengths, (0.0, 0.5, 0.99, 1.0), method="lower")
    return Picture(
        title=_lengths_finding(lengths, plan),
        body=legend([(BARS, "samples"), (INK, "tokens in them"), *borders]) + chart.html(),
        caption="How many samples there are of each length, and how many of the tokens they hold: shortest {:,}, median {:,}, "
        "99th percentile {:,}, longest {:,} tokens. Dashed lines are the groups' pack lengths.".format(*quantiles),
    )


def _octaves(low: float, high: float) -> Axis:
    every = max(1, round((high - low) / 7))  # about seven ticks
    ticks = [(float(power), write_tokens(2**power)) for power in range(math.ceil(low), math.floor(high) + 1, every)]
    return Axis(low=low, high=high, ticks=ticks, label="length, tokens (1K = 1,024; logarithmic)")


def _lengths_finding(lengths: NDArray[np.int32], plan: EpochPlan) -> str:
    total = lengths.sum(dtype=np.int64)
    if lengths.min() == lengths.max():
        return f"All samples have {lengths[0]:,} tokens"
    over = lengths > plan.groups[0].pack_len
    if over.any() and not over.all():
        shares = write_share(over.mean()), write_share(lengths[over].sum(dtype=np.int64) / total)
        return f"{shares[0]} of the samples have over {plan.groups[0].pack_len:,} tokens and hold {shares[1]} of all tokens"
    num_longest = -(-len(lengths) // 10)
    longest = np.partition(lengths, len(lengths) - num_longest)[-num_longest:]
    return f"The longest tenth of the samples holds {write_share(longest.sum(dtype=np.int64) / total)} of all tokens"


def draw_fill(plan: EpochPlan) -> Picture:
    """Draw how full packs are, one chart for each group."""
    tokens = plan.sum_per_pack(plan.lengths)
    holds = np.diff(plan.pack_offsets) > 0
    room = np.array([group.pack_len for group in plan.groups])[plan.pack_group]
    fill = tokens / room
    lowest = min(0.9, np.floor(fill[holds].min() * 10) / 10)
    x = linear_axis(lowest, 1.0, "real tokens / pack length", text="{:.0%}".format)
    charts, means = [], []
    for index, group in enumerate(plan.groups):
        mine = fill[holds & (plan.pack_group == index)]
        if not len(mine):
            means.append(f"{group.name!r} has no packs")
            continue
        counts, edges = np.histogram(mine, bins=50, range=(lowest, 1.0))
        shares = counts / len(mine)
        y = linear_axis(0, 1.1 * shares.max(), f"share of {len(mine):,} packs", ticks=4, text="{:.0%}".format)
        chart = Chart(x, y, label=f"Fill of the packs of {group.pack_len} tokens", height_px=110)
        tips = [f"{low:.1%} to {high:.1%} full: {n:,} packs" for low, high, n in zip(edges, edges[1:], counts, strict=False)]
        chart.bars(edges[:-1], edges[1:], 0, shares, group_colour(index), tips=tips)
        charts.append(legend([(group_colour(index), f"{group.name}: packs of {group.pack_len:,}")]) + chart.html())
        means.append(f"{group.name!r} is {write_share(mine.mean())} full on average, {write_share(mine.min())} at least")
    num_empty = int(np.count_nonzero(~holds))
    left_out = f" {write_count(num_empty, 'empty pack')} not counted: they keep ranks without work in step." if num_empty else ""
    return Picture(
        title=f"Packs are {write_share(tokens.sum() / room[holds].sum())} full",
        body="".join(charts),
        caption=f"How much of each pack is real tokens: {'; '.join(means)}.{left_out}",
    )


def draw_step_tokens(plan: EpochPlan) -> Picture:
    """Draw the tokens of each step along the epoch."""
    tokens, groups = plan.step_tokens, plan.step_groups
    mean = float(tokens.mean())
    chart = Chart(
        linear_axis(0, len(tokens), "optimizer step of the epoch", whole=True),
        linear_axis(0, 1.12 * float(tokens.max()), "real tokens per step, all ranks"),
        label="Tokens of each step",
    )
    chart.dashes(0, len(tokens), mean, MUTED, width=1.5, dots="6 4")
    in_bins = len(tokens) > _MOST_POINTS
    for index in range(len(plan.groups)):
        steps = np.flatnonzero(groups == index)
        if not in_bins:
            chart.points(steps + 0.5, tokens[steps], group_colour(index), width=7 if len(tokens) <= _MOST_LARGE_POINTS else 4)
        elif len(steps):
            width = len(tokens) / NUM_BINS
            bins, firsts = np.unique((steps / width).astype(np.int64), return_index=True)
            low, high = np.minimum.reduceat(tokens[steps], firsts), np.maximum.reduceat(tokens[steps], firsts)
            means = np.add.reduceat(tokens[steps], firsts) / np.diff(firsts, append=len(steps))
            left = (bins + index / len(plan.groups)) * width  # side by side, or equal groups would hide each other
            right = left + 0.9 * width / len(plan.groups)
            chart.bars(left, right, low, high, group_colour(index), opacity=0.3, line=0.5)
            chart.dashes(left, right, means, group_colour(index), width=2.5)
    how = f"Bars go from the least to the most in each of {NUM_BINS} bins, lines are means." if in_bins else "Each dot is a step."
    spread = f"between {tokens.min():,} and {tokens.max():,}" if tokens.min() < tokens.max() else "all the same"
    return Picture(
        title=f"A step trains {mean:,.0f} tokens on average, {spread}",
        body=groups_legend(plan) + chart.html(),
        caption=f"{how} The dashed line is the mean over all steps, their coefficient of variation {tokens.std() / mean:.3f}. "
        "Each step moves the weights once, however many tokens it holds, so that groups should not differ much.",
    )


def groups_legend(plan: EpochPlan, *, naive: bool = False) -> str:
    """Say which colour is which group, as HTML; naive packing is grey."""
    return legend(
        (
            MUTED if naive else group_colour(index),
            f"{group.name}: packs of {group.pack_len:,} on {write_count(group.cp_degree, 'rank')}",
        )
        for index, group in enumerate(plan.groups)
    )
