"""Draws docs/images/packages.svg from the imports: each package, what it is for, and what it uses.

python scripts/package_picture.py > docs/images/packages.svg
"""

import ast
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1] / "hbp_tune"
# Used everywhere, so that arrows to it say nothing; `components` only names what a configuration may name.
_EVERYWHERE = {"errors", "lazy", "components"}
_LEFT, _TOP, _WIDTH, _HEIGHT, _GAP = 16, 16, 640, 62, 14
_LANE = 13


def packages() -> dict[str, str]:
    """Give every package with the first sentence of its docstring."""
    found = {}
    for init in ROOT.glob("*/__init__.py"):
        docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        if init.parent.name not in _EVERYWHERE:
            found[init.parent.name] = docstring.split("\n")[0].replace("`", "")
    return found


def imports() -> dict[str, set[str]]:
    """Give the packages that each package imports, by ``import``, ``from`` and ``hbp.NAME``."""
    names = packages()
    uses: dict[str, set[str]] = {name: set() for name in names}
    for name in names:
        for file in (ROOT / name).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hbp_tune":
                    parts = (node.module or "").split(".")
                    uses[name] |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hbp":
                    uses[name].add(node.attr)
        uses[name] = uses[name] & names.keys() - {name}
    return uses


def in_order(uses: dict[str, set[str]]) -> list[str]:
    """Sort packages so that each stands above all that it uses, the longest way down first."""
    depth: dict[str, int] = {}

    def depth_of(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((depth_of(used) for used in uses[name]), default=0)
        return depth[name]

    return sorted(uses, key=lambda name: (-depth_of(name), name))


def direct(uses: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Give the arrows to draw: those that do not follow from two others."""

    def reached(name: str) -> set[str]:
        return uses[name].union(*map(reached, uses[name]))

    arrows = []
    for name in uses:
        indirect = set().union(*map(reached, uses[name]))
        arrows += [(name, used) for used in sorted(uses[name] - indirect)]
    return arrows


def draw() -> str:
    """Draw the picture."""
    uses, names = imports(), packages()
    order = in_order(uses)
    top = {name: _TOP + i * (_HEIGHT + _GAP) for i, name in enumerate(order)}
    shapes, lanes = [], []
    for name in order:
        parts = sorted(path.parent.name for path in (ROOT / name).glob("*/__init__.py"))
        y = top[name]
        shapes.append(f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" class="box"/>')
        shapes.append(f'<text x="{_LEFT + 14}" y="{y + 25}" class="name">{name}</text>')
        if parts:
            shapes.append(
                f'<text x="{_LEFT + _WIDTH - 14}" y="{y + 25}" text-anchor="end" class="parts">{" · ".join(parts)}</text>'
            )
        shapes.append(f'<text x="{_LEFT + 14}" y="{y + 47}" class="text">{escape(names[name])}</text>')
    # Each arrow in the first lane at the right whose last arrow has ended.
    for name, used in sorted(direct(uses), key=lambda arrow: (top[arrow[1]] - top[arrow[0]], top[arrow[0]])):
        begin, end = top[name] + _HEIGHT - 14, top[used] + 14
        lane = next((i for i, taken in enumerate(lanes) if all(end < a or b < begin for a, b in taken)), len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append((begin, end))
        right = _LEFT + _WIDTH
        x = right + _LANE * (lane + 1)
        shapes.append(f'<path d="M{right} {begin}H{x}V{end}H{right + 5}" class="arrow" marker-end="url(#head)"/>')
    width, height = _LEFT + _WIDTH + _LANE * (len(lanes) + 1) + _LEFT, top[order[-1]] + _HEIGHT + _TOP
    style = (
        ".name{font-weight:bold;font-size:15px;fill:#1b2430}.text,.parts{font-size:12.5px;fill:#566173}"
        ".page{fill:#fff}.box{fill:#f7f9fc;stroke:#c9d2df}"
        ".arrow{fill:none;stroke:#2563eb;stroke-width:1.3}#head path{fill:#2563eb}"
        "@media (prefers-color-scheme:dark){.page{fill:#11151b}.box{fill:#1d2430;stroke:#3b4656}"
        ".name{fill:#e8edf4}.text,.parts{fill:#a9b4c4}"
        ".arrow{stroke:#7aa7ff}#head path{fill:#7aa7ff}}"
    )
    title = "Packages; an arrow leads to what a package uses, where that does not follow from others"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" role="img">'
        f"<title>{title}</title><style>{style}</style>"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z"/></marker></defs><rect width="{width}" height="{height}" rx="8" class="page"/>'
        f"{''.join(shapes)}</svg>\n"
    )


if __name__ == "__main__":
    sys.stdout.write(draw())
