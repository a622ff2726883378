"""Curves over optimizer steps as an SVG file of its own: one panel beside the other, a line and a band of seeds each."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hbp_tune.reporting.pages.charts import GRID, INK, MUTED, linear_axis

COLOURS = ("#2563eb", "#d9540b", "#0d8577", "#8b3fd9", "#c2185b", "#5b7a00")
WIDTH, HEIGHT, MARGIN, TOP, BOTTOM = 460, 260, 56, 44, 40


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One drawing.

    Args:
        title: stands above it.
        y_label: what is drawn, under the title.
        curves: by name, ``float64[seeds, steps]`` each; the mean is drawn as a line over a band from least to most. What
            is not a number is left out.
        is_log: draw logarithms, whose means are geometric; the values must be above 0.
        x_label: what the curves' points are.
        x_names: of the points, evenly spaced; numbered from 1 where left out.
    """

    title: str
    y_label: str
    curves: Mapping[str, NDArray[np.float64]]
    is_log: bool = False
    x_label: str = "optimizer step"
    x_names: Sequence[str] = ()


def draw(panels: Sequence[Panel]) -> str:
    """Draw panels beside each other; a curve's colour is its place among the names of the first panel."""
    width, height = len(panels) * (WIDTH + MARGIN) + 16, TOP + HEIGHT + BOTTOM + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate({MARGIN + index * (WIDTH + MARGIN)} {TOP})">{_panel(panel)}</g>')
    left = MARGIN
    for name, colour in zip(panels[0].curves, COLOURS, strict=False):
        parts.append(f'<rect x="{left}" y="{height - 20}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{left + 17}" y="{height - 10}" fill="{INK}">{html.escape(name)}</text>')
        left += 40 + 8 * len(name)
    return "".join([*parts, "</svg>\n"])


def _panel(panel: Panel) -> str:
    curves = [np.log10(values) if panel.is_log else values for values in panel.curves.values()]
    every = np.concatenate([values.ravel() for values in curves])
    x = linear_axis(1, max(values.shape[1] for values in curves), panel.x_label, whole=True)
    if panel.x_names:
        x = replace(x, ticks=list(enumerate(panel.x_names, start=1)))
    text = (lambda power: f"{10**power:.2g}") if panel.is_log else None
    y = linear_axis(float(np.nanmin(every)), float(np.nanmax(every)), panel.y_label, text=text)
    marks = [f'<text y="-24" fill="{INK}" font-weight="bold">{html.escape(panel.title)}</text>']
    marks.append(f'<text y="-8" fill="{MUTED}">{html.escape(panel.y_label)}</text>')
    for value, text in y.ticks:
        at = HEIGHT * (1 - float(y.place(value)) / 1000)
        marks.append(f'<path d="M0 {at:.1f}H{WIDTH}" stroke="{GRID}"/>')
        marks.append(f'<text x="-6" y="{at + 4:.1f}" text-anchor="end" fill="{MUTED}">{html.escape(text)}</text>')
    for value, text in x.ticks:
        at = WIDTH * float(x.place(value)) / 1000
        marks.append(f'<text x="{at:.1f}" y="{HEIGHT + 16}" text-anchor="middle" fill="{MUTED}">{html.escape(text)}</text>')
    marks.append(f'<text x="{WIDTH}" y="{HEIGHT + 32}" text-anchor="end" fill="{MUTED}">{html.escape(panel.x_label)}</text>')
    for values, colour in zip(curves, COLOURS, strict=False):
        steps = WIDTH * x.place(np.arange(1, values.shape[1] + 1)) / 1000
        there = np.isfinite(values).all(axis=0)
        steps, values = steps[there], values[:, there]
        low, mean, high = (HEIGHT * (1 - y.place(line) / 1000) for line in (values.min(0), values.mean(0), values.max(0)))
        band = [*zip(steps, low, strict=True), *zip(steps[::-1], high[::-1], strict=True)]
        marks.append(f'<polygon points="{_points(band)}" fill="{colour}" fill-opacity="0.15"/>')
        line = _points(zip(steps, mean, strict=True))
        marks.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return "".join(marks)


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
