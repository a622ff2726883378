"""`hbp cp` into an empty folder, one changed line, and plain `tune run`; and `hbp run`, `plan`, `demo` by themselves."""

from pathlib import Path

import pytest

from hbp_tune.demo import prepare_demo
from tests.launching import losses, run, tune

pytestmark = pytest.mark.slow

SMALL = ["groups.0.pack_len=256", "groups.1.pack_len=1024", "planner.tokens_per_step=2048", "max_steps=3", "save_every_n_steps=2"]


def test_copies_with_one_changed_line_run_by_plain_tune(tmp_path: Path) -> None:
    prepare_demo(tmp_path / "hbp_demo", num_samples=150, max_tokens=1000)
    run(["hbp", "cp", "hbp_full_finetune_distributed", "my_recipe.py"], tmp_path)
    run(["hbp", "cp", "demo/tiny_llama_cpu", "my.yaml"], tmp_path)
    config = (tmp_path / "my.yaml").read_text()
    (tmp_path / "my.yaml").write_text(config.replace("output_dir: hbp_runs/demo", "output_dir: mine"))
    run(tune("--config", "my.yaml", *SMALL, name="my_recipe"), tmp_path)
    assert len(losses(tmp_path / "mine")) == 3


def test_the_demo_from_nothing_by_hbp_alone(tmp_path: Path) -> None:
    run(["hbp", "demo", "--num-samples", "150", "--max-tokens", "1000"], tmp_path)
    output = run(["hbp", "plan", "--config", "demo/tiny_llama_cpu", *SMALL, "trace=1"], tmp_path)
    assert "Written: hbp_runs/demo/plan.parquet" in output
    run(
        ["hbp", "run", "--nproc_per_node", "2", "hbp_full_finetune_distributed", "--config", "demo/tiny_llama_cpu", *SMALL],
        tmp_path,
    )
    assert len(losses(tmp_path / "hbp_runs/demo")) == 3
    output = run(["hbp", "run", "--nproc_per_node", "2", "hbp_plan", "--config", "demo/tiny_llama_cpu"], tmp_path, code=2)
    assert "does not support distributed training" in output
