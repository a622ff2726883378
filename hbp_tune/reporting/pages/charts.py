"""Small charts of HTML and inline SVG: the drawing stretches with the page, while its text and lines keep their size.

No plotting library: pictures of one that fit a wide screen have illegible text on a narrow one, and its import takes longer
than planning a million samples.
"""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Names of colours, which `STYLE` gives for light and dark: a page follows its reader's scheme.
INK, MUTED, GRID, BARS = "var(--ink)", "var(--muted)", "var(--grid)", "var(--bars)"
_NAMES = ("page", "card", "edge", "ink", "muted", "grid", "bars", "mark", "special", "warn")
_LIGHT = ("#f4f6f9", "#ffffff", "#dfe4ec", "#1b2430", "#566173", "#dde2ea", "#94a3b8", "#dcf3e1", "#8a2f8f", "#b45309")
_DARK = ("#11151b", "#191f28", "#2f3948", "#e6ebf2", "#a5b1c2", "#323c4b", "#64748b", "#1d4029", "#e59ae9", "#f0a040")
# Of groups: told apart by people who see colours differently too, and at least 3:1 against the cards.
_LIGHT_GROUPS = ("#2563eb", "#d9540b", "#0d8577", "#8b3fd9", "#c2185b", "#5b7a00")
_DARK_GROUPS = ("#6f9dff", "#ff9357", "#3cc5b3", "#bd93ff", "#ff7aa8", "#a9c653")


def _variables(colours: Sequence[str], groups: Sequence[str]) -> str:
    names = (*_NAMES, *(f"group-{index}" for index in range(len(groups))))
    return ";".join(f"--{name}:{colour}" for name, colour in zip(names, (*colours, *groups), strict=True))


STYLE = f"""
:root{{color-scheme:light dark;{_variables(_LIGHT, _LIGHT_GROUPS)}}}
@media(prefers-color-scheme:dark){{:root{{{_variables(_DARK, _DARK_GROUPS)}}}}}
.chart{{position:relative;margin:2.2em 12px 3.1em 3.9em}}
.chart svg{{position:absolute;inset:0;width:100%;height:100%;overflow:visible}}
.chart path{{vector-effect:non-scaling-stroke}}
.chart span{{position:absolute;white-space:nowrap;font-size:12px;line-height:1;color:{MUTED}}}
.chart .y{{right:calc(100% + 6px);transform:translateY(50%)}}
.chart .x{{top:calc(100% + 7px);transform:translateX(-50%)}}
.chart .ylabel{{left:-3.2em;bottom:calc(100% + 12px)}}
.chart .xlabel{{right:0;top:calc(100% + 25px)}}
.chart .note{{color:{INK};transform:translateX(-50%)}}
.legend{{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 2px;padding:0;list-style:none;font-size:13px}}
.legend li{{min-width:0;overflow-wrap:anywhere}}
.legend i{{display:inline-block;width:11px;height:11px;margin-right:6px;border-radius:2px}}
"""


def group_colour(index: int) -> str:
    """Colour of a group by its place among the groups, the same in all pictures and tables."""
    return f"var(--group-{index % len(_LIGHT_GROUPS)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis of a chart.

    Args:
        low: value at the left or the bottom.
        high: value at the right or the top, more than ``low``.
        ticks: values and what is written at them.
        label: what is shown, with its unit.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    label: str

    def place(self, values: ArrayLike) -> NDArray[np.float64]:
        """Give positions along the axis, 0 to 1000."""
        return (np.asarray(values, dtype=np.float64) - self.low) * (1000 / (self.high - self.low))


def linear_axis(
    low: float, high: float, label: str, *, ticks: int = 6, whole: bool = False, text: Callable[[float], str] | None = None
) -> Axis:
    """Make an axis with round ticks; equal bounds are drawn apart.

    Args:
        ticks: how many there are at most, beside the first.
        whole: what is counted, so that there is no tick between whole numbers.
        text: writes a tick; by default a number, in k, M, G or T where it is large.
    """
    if high <= low:
        high = low + 1.0
    power = 10.0 ** math.floor(math.log10((high - low) / ticks))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= (high - low) / ticks * 0.999)
    step = max(step, 1.0) if whole else step
    scale, suffix = next(((s, t) for s, t in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")) if high >= s), (1.0, ""))
    scale = 1e3 if suffix == "k" else scale
    decimals = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    values = step * np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    write = text or (lambda value: f"{value / scale:,.{decimals}f}{suffix}" if value else "0")
    return Axis(low=low, high=high, ticks=[(float(value), write(float(value))) for value in values], label=label)


class Chart:
    """Marks on two axes, drawn in the order in which they were added.

    Args:
        label: says for people who do not see the picture what it is.
        height_px: of the drawing without what is written around it.
    """

    def __init__(self, x: Axis, y: Axis, *, label: str, height_px: int = 220) -> None:
        self.x = x
        self.y = y
        self._label = label
        self._height_px = height_px
        self._marks: list[str] = []
        self._notes: list[str] = []

    def bars(
        self,
        left: ArrayLike,
        right: ArrayLike,
        bottom: ArrayLike,
        top: ArrayLike,
        colour: str,
        *,
        opacity: float = 1.0,
        line: float = 0.8,
        tips: Sequence[str] = (),
    ) -> None:
        """Add rectangles.

        Args:
            opacity: of the fill, from 0 to 1.
            line: width in pixels of the outline, which is all that is seen of one without height.
            tips: a text for each rectangle, shown under the pointer; for a few hundred at most.
        """
        edges = np.broadcast_arrays(self.x.place(left), self.x.place(right), self.y.place(bottom), self.y.place(top))
        paths = [
            f"M{a:.1f} {1000 - d:.1f}H{b:.1f}V{1000 - c:.1f}H{a:.1f}z" for a, b, c, d in zip(*map(np.ravel, edges), strict=True)
        ]
        style = f'fill="{colour}" stroke="{colour}" stroke-width="{line}" fill-opacity="{opacity}"'
        if tips:
            for path, tip in zip(paths, tips, strict=True):
                self._marks.append(f'<path d="{path}" {style}><title>{html.escape(tip)}</title></path>')
        elif paths:
            self._marks.append(f'<path d="{"".join(paths)}" {style}/>')

    def dashes(self, left: ArrayLike, right: ArrayLike, y: ArrayLike, colour: str, *, width: float = 2.0, dots: str = "") -> None:
        """Add horizontal lines, each at its own height; ``dots`` is SVG's ``stroke-dasharray``."""
        ends = np.broadcast_arrays(self.x.place(left), self.x.place(right), self.y.place(y))
        path = "".join(f"M{a:.1f} {1000 - c:.1f}H{b:.1f}" for a, b, c in zip(*map(np.ravel, ends), strict=True))
        self._stroke(path, colour, width, dots)

    def points(self, x: ArrayLike, y: ArrayLike, colour: str, *, width: float = 5.0) -> None:
        """Add round dots."""
        # A line of no length with round ends is a circle that does not stretch with the drawing.
        places = zip(self.x.place(x), self.y.place(y), strict=True)
        self._stroke("".join(f"M{a:.1f} {1000 - b:.1f}h0" for a, b in places), colour, width, "")

    def line(self, x: ArrayLike, y: ArrayLike, colour: str, *, width: float = 2.0) -> None:
        """Add a line from point to point, parted where a value is not finite."""
        path, is_on = "", False
        for a, b in zip(self.x.place(x), self.y.place(y), strict=True):
            path += f"{'L' if is_on else 'M'}{a:.1f} {1000 - b:.1f}" if math.isfinite(b) else ""
            is_on = math.isfinite(b)
        self._stroke(path, colour, width, "")

    def verticals(self, x: ArrayLike, colour: str, *, width: float = 1.0, dots: str = "") -> None:
        """Add lines over the whole height."""
        self._stroke("".join(f"M{a:.1f} 0V1000" for a in np.ravel(self.x.place(x))), colour, width, dots)

    def note(self, x: float, text: str, *, row: int = 0) -> None:
        """Write above the drawing, in one of several rows from the top down."""
        self._notes.append(
            f'<span class="note" style="left:{self.x.place(x) / 10:.2f}%;top:{4 + 14 * row}px">{html.escape(text)}</span>'
        )

    def html(self) -> str:
        """Give the chart as HTML."""
        grid = "".join(f"M0 {1000 - self.y.place(value):.1f}H1000" for value, _ in self.y.ticks)
        grid += "".join(f"M{self.x.place(value):.1f} 1000v12" for value, _ in self.x.ticks)
        y_ticks = "".join(
            f'<span class="y" style="bottom:{self.y.place(value) / 10:.2f}%">{html.escape(text)}</span>'
            for value, text in self.y.ticks
        )
        x_ticks = "".join(
            f'<span class="x" style="left:{self.x.place(value) / 10:.2f}%">{html.escape(text)}</span>'
            for value, text in self.x.ticks
        )
        return (
            f'<div class="chart" style="height:{self._height_px}px"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" '
            f'role="img" aria-label="{html.escape(self._label)}"><path d="{grid}" stroke="{GRID}" fill="none"/>'
            f'{"".join(self._marks)}<path d="M0 1000H1000" stroke="{MUTED}" fill="none"/></svg>{y_ticks}{x_ticks}'
            f'<span class="ylabel">{html.escape(self.y.label)}</span><span class="xlabel">{html.escape(self.x.label)}</span>'
            f"{''.join(self._notes)}</div>"
        )

    def _stroke(self, path: str, colour: str, width: float, dots: str) -> None:
        if path:
            dashed = f' stroke-dasharray="{dots}"' if dots else ' stroke-linecap="round"'
            self._marks.append(f'<path d="{path}" stroke="{colour}" stroke-width="{width}"{dashed} fill="none"/>')


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Say what colours mean, as HTML; entries are colour and text."""
    items = (f'<li><i style="background:{colour}"></i>{html.escape(text)}</li>' for colour, text in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'
