"""What pages for people are made of: their style, tables, tiles and figures, and times in words."""

import math
from collections.abc import Iterable
from html import escape

from hbp_tune.reporting.formats import time_unit
from hbp_tune.reporting.pages import charts
from hbp_tune.reporting.pages.figures import Picture

STYLE = f"""
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:{charts.INK};
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}}
main{{max-width:1040px;margin:0 auto;padding:32px 20px 48px}}
h1{{font-size:clamp(1.35rem,3.4vw,2rem);line-height:1.25;margin:.2em 0 .5em;overflow-wrap:anywhere}}
h2{{font-size:1.15rem;line-height:1.35;margin:0 0 .6em;overflow-wrap:anywhere}}
h3{{font-size:.95rem;margin:1.1em 0 .3em}}
p{{margin:.5em 0;max-width:62em;overflow-wrap:anywhere}}
.eyebrow,.caption,footer{{color:{charts.MUTED};font-size:.9rem}}
.eyebrow{{margin:0;font-weight:600}}
section,figure{{background:var(--card);border:1px solid var(--edge);border-radius:8px;margin:20px 0 0;padding:20px}}
figure .caption{{margin:.2em 0 0}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0 0}}
.tiles div{{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:12px 14px}}
.tiles b{{display:block;font-size:1.45rem;line-height:1.3}}
.tiles span{{display:block;font-size:.85rem;line-height:1.4;color:{charts.MUTED}}}
.warnings{{border-left:4px solid var(--warn)}}
.warnings ul{{margin:0;padding-left:1.2em;overflow-wrap:anywhere}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;width:100%;font-size:.9rem;line-height:1.4}}
th,td{{padding:7px 12px 7px 0;text-align:right;border-bottom:1px solid var(--edge);vertical-align:top;white-space:nowrap}}
th{{color:{charts.MUTED};font-weight:600;vertical-align:bottom;white-space:normal}}
td{{font-variant-numeric:tabular-nums}}
th.text,td.text{{text-align:left}}
td.own{{font-weight:700}}
td.prose{{text-align:left;white-space:normal;min-width:11em;max-width:30em}}
td.prose span{{display:block;font-size:.85rem;color:{charts.MUTED}}}
i.group{{display:inline-block;width:11px;height:11px;margin-right:7px;border-radius:2px}}
@media(max-width:600px){{main{{padding:20px 12px 32px}}section,figure{{padding:16px 14px}}th,td{{padding-right:9px}}}}
"""


def document(title: str, parts: Iterable[str]) -> str:
    """Make an HTML page of its own: no other file, no network, no script."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{charts.STYLE}{STYLE}</style></head>\n'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def table(head: Iterable[str], rows: Iterable[str]) -> str:
    """Make a table of header cells and rows, which scrolls where it is too wide."""
    body = f"<table><thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{body}</div>'


def tiles(entries: Iterable[tuple[str, str]]) -> str:
    """Make tiles of a value and what it is."""
    return f'<div class="tiles">{"".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in entries)}</div>\n'


def figure(picture: Picture) -> str:
    """Make a figure with its finding above and its caption below."""
    caption = f'<figcaption class="caption">{escape(picture.caption)}</figcaption>'
    return f"<figure><h2>{escape(picture.title)}</h2>{picture.body}{caption}</figure>\n"


def duration(seconds: float, *, like: float | None = None) -> str:
    """Write a time, in the unit of ``like`` where both are compared."""
    if not math.isfinite(seconds):
        return "unknown"
    scale, unit, _ = time_unit(seconds if like is None else like)
    value = seconds / scale
    return f"{value:,.{0 if value >= 100 else 1 if value >= 1 else 3}f} {unit}"
