"""The way users start it: `tune run` and `torchrun`, from any directory, with names, paths and copies."""

import re
import sys
from pathlib import Path

import pytest
import yaml

import hbp_tune.recipes.hbp_full_finetune_distributed as recipe
from hbp_tune.config.packaged import packaged_configs
from hbp_tune.demo import prepare_demo
from tests.launching import losses, run, tune

pytestmark = pytest.mark.slow

SMALL = ["groups.0.pack_len=256", "groups.1.pack_len=1024", "planner.tokens_per_step=2048", "max_steps=6", "save_every_n_steps=2"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_demo(tmp_path_factory.mktemp("demo") / "hbp_demo", num_samples=150, max_tokens=1000).directory


def test_packaged_name_from_any_directory(demo: Path, tmp_path: Path) -> None:
    output = run(tune("--config", "demo/tiny_llama_cpu", f"demo_dir={demo}", *SMALL), tmp_path)
    assert "samples placed, each once" in output
    assert len(losses(tmp_path / "hbp_runs/demo")) == 6
    assert (tmp_path / "hbp_runs/demo/epoch_0/model-00001-of-00001.safetensors").exists()


def test_torchrun_without_tune(demo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run(
        [*command, "-m", "hbp_full_finetune_distributed", "--config", "demo/tiny_llama_cpu", f"demo_dir={demo}", *SMALL], tmp_path
    )
    assert len(losses(tmp_path / "hbp_runs/demo")) == 6


def test_copied_recipe_and_config_win_over_the_packaged_ones(demo: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(packaged_configs()["demo/tiny_llama_cpu"].read_text())
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({**config, "demo_dir": str(demo), "output_dir": "mine"}))
    source = Path(recipe.__file__).read_text()
    (tmp_path / "my_recipe.py").write_text(
        source.replace('log = utils.get_logger("INFO")', 'print("MY COPY")\n\nlog = utils.get_logger("INFO")')
    )
    output = run(tune("--config", "my.yaml", *SMALL, name="my_recipe"), tmp_path)
    assert "MY COPY" in output
    assert len(losses(tmp_path / "mine")) == 6


def test_unknown_names_and_mistakes_end_in_one_line(demo: Path, tmp_path: Path) -> None:
    output = run(tune("--config", "llama3_1/9B"), tmp_path, code=1)
    assert re.search(
        r"error: --config llama3_1/9B: no such file, and no packaged config; packaged are demo/tiny_llama_cpu, ", output
    )
    assert output.count("error: --config") == 1
    output = run(tune("--config", "demo/tiny_llama_cpu"), tmp_path, code=1)
    assert "data file hbp_demo/chat.jsonl does not exist" in output
    assert "python -m hbp_tune.demo" in output
    (tmp_path / "bad.jsonl").write_text('{"words": "no messages here"}\n' * 3)
    output = run(tune("--config", "demo/tiny_llama_cpu", f"demo_dir={demo}", "dataset.data_files=bad.jsonl"), tmp_path, code=1)
    assert re.search(r"error: the rows do not fit any format: they have the columns words; say what they hold by", output)
    (tmp_path / "empty.jsonl").write_text("")
    output = run(tune("--config", "demo/tiny_llama_cpu", f"demo_dir={demo}", "dataset.data_files=empty.jsonl"), tmp_path, code=1)
    assert re.search(r"error: dataset: the data set is empty: data file empty.jsonl holds no row", output)


def test_a_start_without_torchrun_is_explained(demo: Path, tmp_path: Path) -> None:
    command = ["tune", "run", "hbp_full_finetune_distributed", "--config", "demo/tiny_llama_cpu", f"demo_dir={demo}"]
    assert "error: start with torchrun: tune run --nproc_per_node N" in run(command, tmp_path, code=1)
