"""The Python API: the same plans as configurations give, figures beside one length, and no torch."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import hbp_tune
from hbp_tune import components
from hbp_tune.config.packaged import packaged_configs
from hbp_tune.errors import ConfigError, DataError
from hbp_tune.models import decoder_shape, model_shape
from hbp_tune.planning import MODELS, BalancePlanner, CostModel, PackingGroup, ShortFirst, known_model
from hbp_tune.recipes.hbp_plan import HBPPlanRecipe
from hbp_tune.reporting import read_plan

LENGTHS = np.append(np.random.default_rng(0).lognormal(6, 1.3, 3999).astype(int).clip(1, 65536), 65536)
GROUPS = [PackingGroup(name="8K", pack_len=8192), PackingGroup(name="64K", pack_len=65536, cp_degree=4)]


def built(name: str) -> Any:
    """Build a model of the table; torchtune's instruct models have as many weights as the base models."""
    if name.startswith("qwen3"):
        return getattr(components, name)()
    family = importlib.import_module(f"torchtune.models.{name[:8] if name.startswith('llama') else name[:7]}")
    return (getattr(family, name, None) or getattr(family, f"{name}_instruct"))()


@pytest.mark.parametrize("name", MODELS)
def test_models_are_what_their_builders_make(name: str) -> None:
    with torch.device("meta"):
        model = built(name)
    assert MODELS[name].shape == model_shape(model)
    assert MODELS[name].decoder == decoder_shape(model)


def test_a_model_of_a_checkpoint_s_config(tmp_path: Path) -> None:
    values = {
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert known_model(str(tmp_path)) == known_model(str(tmp_path / "config.json")) == MODELS["qwen3_8b"]
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "qwen3_moe"}))
    with pytest.raises(ConfigError, match="describes no dense decoder: ValueError: model_type='qwen3_moe' is none of llama, "):
        known_model(str(tmp_path))
    with pytest.raises(ConfigError, match=r"model='llama4' is neither known nor a checkpoint's folder .*; known are llama3"):
        known_model("llama4")


def test_the_plan_is_the_planner_s(tmp_path: Path) -> None:
    plan = hbp_tune.plan(LENGTHS, model="qwen3_8b", world_size=8, groups=GROUPS, curriculum=ShortFirst(0.05), seed=3)
    lengths = LENGTHS.astype(np.int32)
    expected = BalancePlanner(tokens_per_step=524288).plan(
        lengths, lengths, GROUPS, world_size=8, seed=3, curriculum=ShortFirst(0.05), cost=CostModel(MODELS["qwen3_8b"].shape)
    )
    assert plan.epoch.hash == expected.hash
    (read,) = read_plan(plan.save(tmp_path / "plan.parquet"))
    assert read.hash == expected.hash
    table = plan.to_pandas()
    assert sorted(table["sample"]) == list(range(4000))
    assert (table["length"].to_numpy() == lengths[table["sample"]]).all()


def test_what_it_shows() -> None:
    plan = hbp_tune.plan(LENGTHS.tolist(), world_size=8)
    assert [group.pack_len for group in plan.groups][-1] == 65536
    text = repr(plan)
    assert text.splitlines()[0] == plan.report.headline
    assert "Modelled cost and time on 8 H100s" in text
    assert plan.summary()["metrics"]["epoch_s"] == plan.metrics.epoch_s
    assert plan.metrics.epoch_s < plan.report.baselines["isf"].epoch_s
    page = plan._repr_html_()
    assert page.startswith('<iframe srcdoc="')
    assert "4,000 samples placed" in page


def test_groups_are_those_of_hbp_plan(tmp_path: Path) -> None:
    np.save(tmp_path / "lengths.npy", LENGTHS)
    cfg = OmegaConf.load(packaged_configs()["llama3_1/8B_hbp_full"])
    cfg.merge_with({"lengths": str(tmp_path / "lengths.npy"), "world_size": 8, "output_dir": str(tmp_path)})
    cfg.groups = "auto"
    recipe = HBPPlanRecipe(cfg)
    recipe.setup(cfg)
    assert hbp_tune.plan(str(tmp_path / "lengths.npy"), seed=42).groups == recipe._groups


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([], DataError, "lengths: there is no row"),
        ([5, 0], DataError, "lengths: row 1 is 0, a sample has at least 1 token"),
        ([5, 1.5], DataError, "lengths: row 1 is 1.5, no whole number"),
        ([[5, 6]], DataError, "lengths holds list"),
        (np.ones((2, 2), dtype=int), DataError, "lengths are not a row of numbers"),
        ("tulu4", ConfigError, r"lengths='tulu4' is not a file \(.csv, .csv.gz, .parquet, .npy\), and"),
        ("no.csv", DataError, "lengths file no.csv does not exist"),
    ],
)
def test_lengths_that_are_none(lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hbp_tune.plan(lengths)


def test_a_sample_that_fits_nowhere() -> None:
    with pytest.raises(ConfigError, match="no packing group fits into memory"):
        hbp_tune.plan([100], model="llama3_1_70b", world_size=1)


def test_the_page_s_lines_run_without_torch(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/notebook.md").read_text(), re.DOTALL)
    (tmp_path / "lengths.csv").write_text("num_tokens\n" + "".join(f"{length}\n" for length in LENGTHS))
    code = "\n".join(blocks) + "\nimport sys; print(sorted({'torch', 'torchtune', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "plan.parquet").exists()
