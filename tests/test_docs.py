"""The documentation: it builds without a warning, its commands name what exists, and its examples run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from torchtune import _recipe_registry

from hbp_tune.cli.__main__ import build_parser, expand
from hbp_tune.cli.registry import register
from hbp_tune.config import check_config
from hbp_tune.config.packaged import packaged_configs
from hbp_tune.planning import BalancePlanner, PackingGroup

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What stands for something of the reader's.
THEIRS = ("my.yaml", "CONFIG", "NAME", "...", "my_recipe", "stock.yaml")


def commands() -> list[tuple[str, str]]:
    """Find the lines of shell blocks that start our commands, with their page; lines that go on are joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:console|bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"^(\$ |srun )", "", line.strip()).split("  #")[0]
                if line.startswith(("hbp ", "tune run ")):
                    found.append((page.name, line))
    return found


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = sorted(path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("*.html"))
    for page in pages:
        text = (tmp_path / "site" / page).read_text()
        for target in re.findall(r'(?:href|src)="([^"#:]+)(?:#[^"]*)?"', text):
            if not target.startswith("/"):
                assert (tmp_path / "site" / page.parent / target).resolve().exists(), f"{page} leads to {target}"


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 12
    assert {page for page, _ in commands()} >= {"README.md", "choosing_groups.md", "profiling.md", "slurm.md"}


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_name_what_exists(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recipe_registry, "_ALL_RECIPES", list(_recipe_registry._ALL_RECIPES))
    register()
    words = shlex.split(re.sub(r"\$\w+|\"\$\w+[:\d]*\"", "1", line))[1:]
    args = build_parser().parse_args(expand(words))
    if hasattr(args, "recipe"):
        known = {recipe.name for recipe in _recipe_registry.get_all_recipes()} | set(THEIRS)
        assert args.recipe in known
        rest: list[str] = args.recipe_args
        name = rest[rest.index("--config") + 1]
        assert name in packaged_configs() or name in THEIRS or name.startswith("hbp_runs/")
        cfg: Any = OmegaConf.load(
            packaged_configs()[name] if name in packaged_configs() else packaged_configs()["llama3_1/8B_hbp_full"]
        )
        overrides = [word for word in rest if "=" in word and not re.match(r"\w+\.\d+", word)]
        check_config(OmegaConf.merge(cfg, OmegaConf.from_dotlist(overrides)))
    elif hasattr(args, "file"):
        every = {recipe.name for recipe in _recipe_registry.get_all_recipes()}
        assert args.file in every | set(packaged_configs())


def test_parts_of_ones_own_run() -> None:
    text = (ROOT / "docs/extending.md").read_text()
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, scope)
    lengths = np.array([100, 900, 50, 70, 4000, 30], dtype=np.int32)
    groups = [PackingGroup(name="short", pack_len=1024), PackingGroup(name="long", pack_len=4096)]
    planner = BalancePlanner(mode="paper", packer=scope["OneByOne"](), fill=False)
    plan = planner.plan(lengths, lengths, groups, world_size=1, seed=0, curriculum=scope["LongFirst"]())
    assert sorted(plan.sample_ids.tolist()) == list(range(6))
    assert plan.num_packs == 6, "one by one"
    assert plan.lengths[0] == 4000, "long first"


def test_yaml_of_the_documentation_is_yaml() -> None:
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            assert yaml.safe_load(block), page
