"""One page that explains a plan to a person who has never seen one."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from hbp_tune.planning.comparison.metrics import PlanMetrics
from hbp_tune.reporting.formats import write_count, write_share
from hbp_tune.reporting.pages import charts
from hbp_tune.reporting.pages.balance_figures import describe_micro_steps, draw_attention, draw_busy, draw_timeline
from hbp_tune.reporting.pages.figures import draw_fill, draw_lengths, draw_step_tokens
from hbp_tune.reporting.pages.page_parts import document, duration, figure, table, tiles
from hbp_tune.reporting.report import PlanReport, describe_groups
from hbp_tune.reporting.samples import SAMPLE_STYLE, render_sample

_EXPLANATION = """<section><h2>What a plan is</h2><p>Samples of a data set differ in length, so that several are put into one
<b>pack</b>, a row that a rank, or a few ranks together, compute at once. Each <b>group</b> has its own pack length and its own
number of ranks per pack, so that short samples do not pay for what long ones need. In a <b>micro-step</b> all ranks compute one
pack each and wait for the slowest; one or more micro-steps make an <b>optimizer step</b>. A good plan leaves ranks little to wait
for, hardly pads, and shares few tokens out over ranks. <b>One-length packing</b>, named isf below, puts all samples into packs of
the shortest group that holds the longest, whatever they cost: it is what this plan is compared with.</p></section>
"""


_GROUP_COLUMNS = (
    "pack length",
    "ranks per pack (CP)",
    "recomputed layers (AC)",
    "samples",
    "packs",
    "steps",
    "micro-steps per step",
    "share of tokens",
    "tokens per step",
)


class _Metric(NamedTuple):
    key: str
    name: str
    meaning: str


_METRICS = (
    _Metric(
        "epoch_s",
        "Modelled epoch",
        "Time of an epoch by the cost model: good for comparing plans, a first estimate otherwise.",
    ),
    _Metric(
        "idle",
        "Idle",
        "Share of the work's time that ranks wait for the slowest one of a micro-step; long micro-steps count for more.",
    ),
    _Metric("p99_imbalance", "Idle, p99", "99 of 100 optimizer steps idle at most this share."),
    _Metric("cbr", "CBR", "Cost balance ratio: idle share by the whole cost, attention and all else, mean over micro-steps."),
    _Metric("abr", "ABR", "Attention balance ratio: idle share by attention work alone, mean over micro-steps."),
    _Metric(
        "dbr",
        "DBR",
        "Dist balance ratio: idle share by tokens, mean over micro-steps; harmless where attention makes up for it.",
    ),
    _Metric("pr", "PR", "Padding ratio: share of the computed tokens that are padding, in packs that hold samples."),
    _Metric("pr_tail", "PR, empty", "Share of the computed tokens in empty packs, which keep ranks without work in step."),
    _Metric(
        "cr", "CR", "Communication ratio: share of tokens in packs that several ranks share, which costs exchange in every layer."
    ),
    _Metric("ave_t", "Ave-T", "Real tokens per rank and micro-step; more keep a GPU busier."),
    _Metric(
        "diversity",
        "Diversity",
        "How far steps differ in what they are made of: 1 is as far as random ones, 4 is four times the variance.",
    ),
)


def render_page(report: PlanReport) -> str:
    """Render a report as one HTML page that needs no other file, no network and no script."""
    before, after = describe_micro_steps(report.naive, report.cost), describe_micro_steps(report.plan, report.cost)
    pictures = (
        draw_lengths(report.lengths, report.plan),
        draw_fill(report.plan),
        draw_busy(report, before, after),
        draw_attention(report, before, after),
        draw_timeline(report.plan, after),
        draw_step_tokens(report.plan),
    )
    parts = (
        _header(report),
        _tiles(report),
        _warnings(report.warnings),
        _EXPLANATION,
        _groups(report),
        _metrics(report),
        *map(figure, pictures),
        _samples(report),
        _footer(report),
    )
    title = f"Plan: {write_count(len(report.plan.sample_ids), 'sample')} on {write_count(report.plan.world_size, 'rank')}"
    return document(title, parts)


def _header(report: PlanReport) -> str:
    plan = report.plan
    left_out = (f"{len(ids):,} {what}" for what, ids in (("dropped", plan.dropped), ("truncated", plan.truncated)) if len(ids))
    facts = (
        f"{write_count(len(plan.sample_ids), 'sample')} placed",
        *left_out,
        write_count(int(plan.lengths.sum(dtype=np.int64)), "token"),
        write_count(plan.num_steps, "optimizer step"),
        write_count(plan.world_size, "rank"),
        *([f"the first of {len(report.plans)} epochs"] if len(report.plans) > 1 else []),
    )
    return (
        f'<header><p class="eyebrow">Plan of a fine-tuning epoch</p><h1>{escape(report.headline)}</h1>'
        f"<p>{', '.join(facts)}. Lengths: {escape(report.lengths_from)}.</p></header>\n"
    )


def _tiles(report: PlanReport) -> str:
    own, naive = report.metrics, report.baselines["isf"]
    beside = (
        ("modelled epoch", duration(own.epoch_s), duration(naive.epoch_s, like=own.epoch_s)),
        ("of the time ranks wait", write_share(own.idle), write_share(naive.idle)),
        ("of the tokens pay for context parallelism", write_share(own.cr), write_share(naive.cr)),
        ("of the computed tokens are padding", write_share(own.pr), write_share(naive.pr)),
    )
    return tiles((value, f"{what}; one-length packing: {other}") for what, value, other in beside)


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in warnings)
    return f'<section class="warnings"><h2>Before you train</h2><ul>{lines}</ul></section>\n'


def _groups(report: PlanReport) -> str:
    plan = report.plan
    groups = describe_groups(plan)
    total = sum(group.tokens for group in groups)
    rows = []
    for index, group in enumerate(groups):
        per_step = "-"
        if group.tokens_per_step is not None and group.tokens_per_step_cv is not None:
            per_step = f"{group.tokens_per_step:,.0f} ± {write_share(group.tokens_per_step_cv)}"
        cells = (
            f"{group.pack_len:,}",
            str(group.cp_degree),
            plan.groups[index].describe_ac(),
            f"{group.samples:,}",
            f"{group.packs:,}",
            f"{group.steps:,}",
            f"{group.micro_steps / group.steps:.1f}" if group.steps else "-",
            write_share(group.tokens / total),
            per_step,
        )
        colour = charts.group_colour(index)
        name = f'<td class="text"><i class="group" style="background:{colour}"></i>{escape(group.name)}</td>'
        rows.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    drawn = table(('<th class="text">group</th>', *(f"<th>{name}</th>" for name in _GROUP_COLUMNS)), rows)
    return (
        f'<section><h2>Packing groups</h2>{drawn}<p class="caption">Tokens per step: mean and coefficient of '
        "variation (standard deviation over mean).</p></section>\n"
    )


def _metrics(report: PlanReport) -> str:
    head = [f"<th>{escape(name)}</th>" for name in ("this plan", *report.baselines)]
    rows = []
    for metric in _METRICS:
        others = "".join(f"<td>{_value(metric.key, other, report.metrics)}</td>" for other in report.baselines.values())
        rows.append(
            f'<tr><td class="prose">{metric.name}<span>{metric.meaning}</span></td>'
            f'<td class="own">{_value(metric.key, report.metrics, report.metrics)}</td>{others}</tr>'
        )
    drawn = table(('<th class="text">metric</th>', *head), rows)
    return (
        f"<section><h2>Metrics beside other packings of the same data</h2>{drawn}"
        '<p class="caption">Less is better, except for Ave-T. The other packings put all samples into '
        "packs of the shortest group that holds them all.</p></section>\n"
    )


def _samples(report: PlanReport) -> str:
    if not report.samples:
        return ""
    shown = "".join(map(render_sample, report.samples))
    return (
        f"<style>{SAMPLE_STYLE}</style><section><h2>The first samples, as they are trained</h2><p>Marked green is what the model "
        f"learns to generate. <code>hbp data</code> shows any row.</p>{shown}</section>\n"
    )


def _value(key: str, metrics: PlanMetrics, own: PlanMetrics) -> str:
    value = float(getattr(metrics, key))
    if not math.isfinite(value):
        return "-"
    if key == "epoch_s":
        return duration(value, like=own.epoch_s)
    return f"{value:,.0f}" if key == "ave_t" else f"{value:.2f}" if key == "diversity" else write_share(value)


def _footer(report: PlanReport) -> str:
    seconds = ", ".join(f"{escape(phase)} {value:.2f} s" for phase, value in report.seconds.items())
    took = f"It took: {seconds}. " if seconds else ""
    return (
        f"<footer><p>{took}All durations of training are modelled for {report.cost.rates.machine} GPUs, none was measured. "
        f"Hash of the plan, equal on every machine that plans the same: {report.plan.hash}</p></footer>"
    )
