"""One page that shows a person how a run went: loss, speed, waiting and memory, by packing group."""

from collections.abc import Callable, Iterator
from html import escape

import numpy as np
from numpy.typing import NDArray

from hbp_tune.reporting.files.run_log import RunLog
from hbp_tune.reporting.formats import write_count, write_share, write_tokens
from hbp_tune.reporting.pages.charts import MUTED, Chart, group_colour, legend, linear_axis
from hbp_tune.reporting.pages.figures import Picture
from hbp_tune.reporting.pages.page_parts import document, duration, figure, table, tiles

# Steps of a running mean, as a share of the run.
_SMOOTHED = 0.05
# Steps, up to which dots have space to be large.
_MOST_LARGE_DOTS = 200
_COLUMNS = (
    "steps",
    "tokens",
    "time",
    "seconds per step",
    "tokens/s per GPU",
    "waiting",
    "loss, first",
    "loss, last",
    "peak memory",
)

Groups = list[tuple[str, NDArray[np.bool_]]]


def render_run_page(log: RunLog, title: str) -> str:
    """Render a run's figures as one HTML page that needs no other file, no network and no script.

    Args:
        log: of the run.
        title: what run it is.
    """
    trained = RunLog(steps=tuple(step for step in log.steps if "loss" in log.figures[step]), figures=log.figures)
    groups = _groups(trained)
    parts = [
        _header(trained, title),
        _tiles(trained),
        _table(trained, groups),
        *(figure(picture) for picture in _pictures(log, trained, groups)),
    ]
    return document(f"Run: {title}", parts)


def _groups(log: RunLog) -> Groups:
    """Tell the steps of each group apart by pack length and CP degree, from short to long."""
    pairs = np.column_stack((log.column("pack_len"), log.column("cp_degree")))
    found = []
    for pack_len, cp_degree in sorted({(float(a), float(b)) for a, b in pairs if np.isfinite(a)}):
        mine = (pairs[:, 0] == pack_len) & (pairs[:, 1] == cp_degree)
        found.append((f"{write_tokens(int(pack_len))}, CP {int(cp_degree)}", mine))
    return found or [("all", np.ones(len(log.steps), dtype=np.bool_))]


def _header(log: RunLog, title: str) -> str:
    loss = log.column("loss")
    first, last = _smooth(loss)[[0, -1]] if len(loss) else (np.nan, np.nan)
    fact = f"{write_count(len(log.steps), 'step')}: loss from {first:.3f} to {last:.3f}"
    skipped = int(np.nanmax(log.column("skipped_steps"), initial=0))
    warning = f" {write_count(skipped, 'step')} skipped: loss or gradient was not finite." if skipped else ""
    logged = f"Steps as logged, to {log.steps[-1]:,}.{warning}"
    return f'<header><p class="eyebrow">{escape(title)}</p><h1>{fact}</h1><p>{logged}</p></header>\n'


def _tiles(log: RunLog) -> str:
    seconds, tokens = log.column("step_s"), log.column("num_tokens")
    entries = [
        (duration(float(np.nansum(seconds))), "in optimizer steps, without saving and validation"),
        (f"{np.nansum(tokens):,.0f}", "tokens"),
        (f"{_mean(log.column('tokens_per_second_per_gpu'), seconds):,.0f}", "tokens/s per GPU"),
        (write_share(_mean(log.column("idle_ratio"), seconds)), "of the busy time ranks waited for the slowest"),
        (write_share(_mean(log.column("data_wait_ratio"), seconds)), "of the time was spent waiting for data"),
    ]
    if np.isfinite(mfu := log.column("mfu")).any():
        entries.append((write_share(_mean(mfu, seconds)), "model FLOPs utilisation"))
    return tiles(entries)


def _table(log: RunLog, groups: Groups) -> str:
    seconds, tokens, loss = log.column("step_s"), log.column("num_tokens"), log.column("loss")
    memory = log.keys("peak_memory_gib_")
    rows = []
    for index, (name, mine) in enumerate(groups):
        peak = max((float(np.nanmax(log.column(key)[mine], initial=0.0)) for key in memory), default=0.0)
        smooth = _smooth(loss[mine])
        cells = (
            f"{np.count_nonzero(mine):,}",
            write_share(float(np.nansum(tokens[mine]) / np.nansum(tokens))),
            write_share(float(np.nansum(seconds[mine]) / np.nansum(seconds))),
            f"{np.nanmean(seconds[mine]):.2f}",
            f"{_mean(log.column('tokens_per_second_per_gpu')[mine], seconds[mine]):,.0f}",
            write_share(_mean(log.column("idle_ratio")[mine], seconds[mine])),
            f"{smooth[0]:.3f}",
            f"{smooth[-1]:.3f}",
            f"{peak:.1f} GiB" if peak else "-",
        )
        colour = f'<i class="group" style="background:{group_colour(index)}"></i>'
        rows.append(f'<tr><td class="text">{colour}{name}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    head = ('<th class="text">group</th>', *(f"<th>{name}</th>" for name in _COLUMNS))
    return f"<section><h2>By packing group</h2>{table(head, rows)}</section>\n"


def _pictures(log: RunLog, trained: RunLog, groups: Groups) -> Iterator[Picture]:
    losses = trained.column("loss")
    yield Picture(
        title=f"Loss falls to {_smooth(losses)[-1]:.3f}" if _smooth(losses)[-1] < _smooth(losses)[0] else "Loss does not fall",
        body=_by_group(trained, groups, "loss", "loss of the step", from_zero=False),
        caption="Each dot is a step of its group; lines are running means. Groups hold samples of different length, whose losses "
        "differ by themselves: compare a group with itself.",
    )
    if buckets := log.keys("val_loss"):
        yield _validation(log, buckets)
    yield Picture(
        title=f"{_mean(trained.column('tokens_per_second_per_gpu'), trained.column('step_s')):,.0f} tokens/s on each GPU",
        body=_by_group(trained, groups, "tokens_per_second_per_gpu", "tokens/s per GPU"),
        caption="Real tokens, without padding. Long documents have more attention for each token: their steps are slower.",
    )
    if np.isfinite(idle := trained.column("idle_ratio")).any():
        planned = trained.column("abr")
        yield Picture(
            title=f"Ranks wait {write_share(_mean(idle, trained.column('step_s')))} of the busy time",
            body=_by_group(trained, groups, "idle_ratio", "share of busy time", text=write_share),
            caption="Measured over all ranks, micro-step by micro-step: what the busiest rank computes and others do not. "
            f"By attention alone the plan left {write_share(_mean(planned, trained.column('step_s')))} uneven, which other work "
            "evens out.",
        )
    yield Picture(
        title=f"Half of the steps took less than {np.nanmedian(trained.column('step_s')):.2f} s",
        body=_by_group(trained, groups, "step_s", "seconds of a step"),
        caption="From asking for the step's first pack to the end of the optimizer's step, on rank 0.",
    )


def _by_group(
    log: RunLog, groups: Groups, key: str, label: str, *, from_zero: bool = True, text: Callable[[float], str] | None = None
) -> str:
    """Draw a figure over the steps, a colour for each group; ``text`` writes its values."""
    steps, values = np.array(log.steps, dtype=np.float64), log.column(key)
    known = values[np.isfinite(values)]
    low = 0.0 if from_zero or not len(known) else float(known.min())
    margin = 0.05 * (float(known.max(initial=low + 1e-9)) - low)
    chart = Chart(
        linear_axis(float(steps[0]), float(steps[-1]), "optimizer step", whole=True),
        linear_axis(low - (0 if from_zero else margin), float(known.max(initial=low)) + margin, label, ticks=5, text=text),
        label=f"{label} over the steps",
    )
    for index, (_, mine) in enumerate(groups):
        there = mine & np.isfinite(values)
        chart.points(steps[there], values[there], group_colour(index), width=7 if len(steps) <= _MOST_LARGE_DOTS else 4)
    for index, (_, mine) in enumerate(groups):
        there = mine & np.isfinite(values)
        chart.line(steps[there], _smooth(values[there]), group_colour(index))
    return legend((group_colour(index), name) for index, (name, _) in enumerate(groups)) + chart.html()


def _validation(log: RunLog, keys: list[str]) -> Picture:
    seen = [step for step in log.steps if keys[0] in log.figures[step]]
    values = np.array([[log.figures[step].get(key, np.nan) for step in seen] for key in keys])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = 0.05 * (high - low) or 0.05
    chart = Chart(
        linear_axis(float(log.steps[0]), float(log.steps[-1]), "optimizer step", whole=True),
        linear_axis(low - margin, high + margin, "loss of held-out data", ticks=5),
        label="Loss of held-out data over the steps",
    )
    colours = [MUTED, *(group_colour(index) for index in range(len(keys) - 1))]
    for row, colour in zip(values, colours, strict=True):
        chart.line(seen, row, colour)
        chart.points(seen, row, colour)
    names = ["all", *(key.removeprefix("val_loss_").replace("len_", "to ") for key in keys[1:])]
    best = int(np.nanargmin(values[0]))
    return Picture(
        title=f"Lowest held-out loss: {values[0, best]:.3f}, after step {seen[best]:,}",
        body=legend(zip(colours, names, strict=True)) + chart.html(),
        caption="Mean over all targets, and of those in samples up to each length in tokens, or of one data set.",
    )


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give a running mean over a twentieth of the steps around each, fewer at the ends; 3 at least."""
    if not len(values):
        return np.array([np.nan])
    half = max(1, round(_SMOOTHED * len(values) / 2))
    sums, known = (np.append(0.0, np.cumsum(part)) for part in (np.nan_to_num(values), np.isfinite(values).astype(float)))
    first, last = np.maximum(np.arange(len(values)) - half, 0), np.minimum(np.arange(len(values)) + half + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        means: NDArray[np.float64] = (sums[last] - sums[first]) / (known[last] - known[first])
    return means


def _mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    there = np.isfinite(values) & np.isfinite(weights)
    return float(np.average(values[there], weights=weights[there])) if there.any() and weights[there].sum() > 0 else float("nan")
