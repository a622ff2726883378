"""The page about packages says what the imports say."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_picture_is_what_the_imports_say() -> None:
    drawn = subprocess.run(
        [sys.executable, ROOT / "scripts/package_picture.py"], capture_output=True, text=True, check=True
    ).stdout
    assert (ROOT / "docs/images/packages.svg").read_text(encoding="utf-8") == drawn, (
        "run python scripts/package_picture.py > docs/images/packages.svg"
    )


def test_every_package_has_its_line() -> None:
    named = {name for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE) for name in re.findall(r"`([\w.]+)`", row)}
    folders = {path.parent.relative_to(ROOT / "hbp_tune") for path in (ROOT / "hbp_tune").rglob("__init__.py")}
    whole = {".".join(folder.parts) for folder in folders if folder.parts}
    assert named >= {name for name in whole if not any(other.startswith(name + ".") for other in whole)}
    assert named <= whole


def test_every_file_to_change_is_there() -> None:
    rows = re.findall(r"^\| [^`|]+ \| (.*`.*) \|$", PAGE.split("## To change")[1], re.MULTILINE)
    assert len(rows) == 14
    for row in rows:
        folder = ROOT
        for name in re.findall(r"`([\w/]+\.py)`", row):
            path = ROOT / "hbp_tune" / name if "/" in name else folder / name
            folder = path.parent
            assert path.is_file(), name


def test_no_package_or_module_grows_out_of_sight() -> None:
    modules = list((ROOT / "hbp_tune").rglob("*.py"))
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules}
    recipes = [path for path in modules if path.parent.name == "recipes"]
    assert not [path for path in modules if sizes[path] > (600 if path in recipes else 400)]
    for folder in {path.parent for path in modules}:
        assert sum(sizes[path] for path in modules if path.parent == folder) <= 2000, folder
