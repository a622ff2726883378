"""Configurations are what the table, the template and the chosen groups make of them."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from hbp_tune.config.packaged import packaged_configs
from hbp_tune.planning import SAFE_SHARE, gpu_named

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts/make_configs.py"))


def test_files_and_page_are_what_the_table_says(script: dict[str, Any]) -> None:
    for path, text in script["written"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python scripts/make_configs.py"


def test_every_configuration_but_the_demo_is_of_the_table(script: dict[str, Any]) -> None:
    assert {config.name for config in script["configs"]()} == set(packaged_configs()) - {"demo/tiny_llama_cpu"}


def test_a_step_takes_at_most_nine_tenths_of_its_card(script: dict[str, Any]) -> None:
    chosen = script["chosen_groups"]()
    for config in script["configs"]():
        entry = chosen[config.name]
        assert entry["peak_gib"] == round(script["peak_gib"](config, entry["groups"]), 1), config.name
        assert entry["peak_gib"] <= SAFE_SHARE * gpu_named(config.gpu).memory_gib, config.name
        assert entry["groups"][-1]["pack_len"] == config.positions, config.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3_1/8B_hbp_full", "qwen2_5/3B_hbp_full", "llama3_1/8B_hbp_full_single_device"])
def test_the_groups_are_those_that_the_models_choose(script: dict[str, Any], name: str) -> None:
    config = next(config for config in script["configs"]() if config.name == name)
    assert script["choose"](config) == script["chosen_groups"]()[name]["groups"]
