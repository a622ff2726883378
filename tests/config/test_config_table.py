import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_configurations_is_what_the_files_say() -> None:
    script = runpy.run_path(str(ROOT / "scripts/config_table.py"))
    assert (ROOT / "docs/configs.md").read_text() == script["page"](), "run python scripts/config_table.py --write"
