"""Makes one site of the README, docs/, the change log and the benchmarks' results, whose links lead through the repository.

The README is the site's first page. Links to results lead to pages made of these files; links to other files of the repository,
which the site does not have, become their names.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
# Files of the repository's root, and the pages that they become.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add pages that lie elsewhere in the repository."""
    results = sorted(path.relative_to(ROOT) for path in (ROOT / RESULTS).glob("*.md"))
    sources = PAGES | {str(path): f"results/{path.name}" for path in results}
    for source, page in sources.items():
        text = _relinked((ROOT / source).read_text(encoding="utf-8"), source, page)
        files.append(File.generated(config, page, content=text))
    listed = "".join(f"- [{_title(ROOT / path)}](results/{path.name})\n" for path in results)
    files.append(
        File.generated(config, "results.md", content=f"# Results\n\nBy hardware and date, each with its command.\n\n{listed}")
    )
    for picture in sorted((ROOT / RESULTS).rglob("*.svg")):
        where = "results/" + picture.relative_to(ROOT / RESULTS).as_posix()
        files.append(File.generated(config, where, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Mend the links of the pages in docs/."""
    source = page.file.src_uri
    return markdown if page.file.generated_by else _relinked(markdown, f"docs/{source}", source)


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def _relinked(text: str, source: str, page: str) -> str:
    """Turn links between files of the repository into links between pages; code stays as it is."""
    parts = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(lambda m: _link(m, source, page), part) for part in parts)


def _link(match: re.Match[str], source: str, page: str) -> str:
    picture, label, target = match.groups()
    if "://" in target or target.startswith("#"):
        return match[0]
    path, _, anchor = target.partition("#")
    there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if (where := _page_of(there)) is None:
        return f"{label} (`{there}`)" if f"`{there}`" != label else label
    up = "../" * page.count("/")
    return f"{picture}[{label}]({up}{where}{'#' + anchor if anchor else ''})"


def _page_of(path: str) -> str | None:
    """Give the page that a file of the repository becomes; None where it becomes none."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith(f"{RESULTS}/") and path.endswith((".md", ".svg")):
        return "results/" + path.removeprefix(f"{RESULTS}/")
    if path.startswith("docs/") and not path.endswith(".diff"):
        return path.removeprefix("docs/")
    return None
