"""The way users start it: `tune run` and `torchrun`, from any directory, with names, paths and copies; and crashes."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

import hbp_tune.recipes.hbp_full_finetune_distributed as recipe
from hbp_tune.components.config.packaged import packaged_configs
from hbp_tune.demo import prepare_demo

pytestmark = pytest.mark.slow

SMALL = ["groups.0.pack_len=256", "groups.1.pack_len=1024", "planner.tokens_per_step=2048", "max_steps=6", "save_every_n_steps=2"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_demo(tmp_path_factory.mktemp("demo") / "hbp_demo", num_samples=150, max_tokens=1000).directory


def start(command: list[str], cwd: Path) -> subprocess.Popen[str]:
    bin_dir = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "HF_DATASETS_CACHE": str(cwd / "cache")}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(command: list[str], cwd: Path, *, code: int = 0) -> str:
    process = start(command, cwd)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output[-4000:]
    return output


def tune(*arguments: str, name: str = "hbp_full_finetune_distributed") -> list[str]:
    return ["tune", "run", "--nproc_per_node", "2", name, *arguments]


def losses(output_dir: Path) -> dict[int, str]:
    """Give the logged loss and gradient norm of each step, to the last digit; later logs replace earlier ones."""
    found: dict[int, str] = {}
    for log in sorted(output_dir.glob("logs/log_*.txt"), key=lambda path: path.stat().st_mtime):
        for line in log.read_text().splitlines():
            if match := re.match(r"Step (\d+) \| (loss:\S+) \S+ (grad_norm:\S+)", line):
                found[int(match[1])] = f"{match[2]} {match[3]}"
    return found


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
    (tmp_path / "bad.jsonl").write_text('{"text": "no messages here"}\n' * 3)
    output = run(tune("--config", "demo/tiny_llama_cpu", f"demo_dir={demo}", "dataset.data_files=bad.jsonl"), tmp_path, code=1)
    assert re.search(r"error: row 0 of data set 0 is no conversation that its component can read: KeyError: 'messages'", output)
    (tmp_path / "empty.jsonl").write_text("")
    output = run(tune("--config", "demo/tiny_llama_cpu", f"demo_dir={demo}", "dataset.data_files=empty.jsonl"), tmp_path, code=1)
    assert re.search(r"error: dataset 0: the data set is empty: data file empty.jsonl holds no row", output)


def test_a_start_without_torchrun_is_explained(demo: Path, tmp_path: Path) -> None:
    command = ["tune", "run", "hbp_full_finetune_distributed", "--config", "demo/tiny_llama_cpu", f"demo_dir={demo}"]
    assert "error: start with torchrun: tune run --nproc_per_node N" in run(command, tmp_path, code=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_kill_minus_nine_in_mid_epoch_and_resume(demo: Path, tmp_path: Path, num_workers: int) -> None:
    settings = ["--config", "demo/tiny_llama_cpu", f"demo_dir={demo}", *SMALL, "max_steps=10", f"num_workers={num_workers}"]
    run(tune(*settings, "output_dir=whole"), tmp_path)
    killed = start(tune(*settings, "output_dir=killed"), tmp_path)
    deadline = time.monotonic() + 120
    while len(losses(tmp_path / "killed")) < 5:
        assert time.monotonic() < deadline, "the run does not get to step 5"
        time.sleep(0.02)
    agent = psutil.Process(killed.pid)
    for process in (agent, *agent.children(recursive=True)):  # torchrun's workers have sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed.communicate()
    shutil.rmtree(tmp_path / "killed/logs")
    run(tune(*settings, "output_dir=killed", "resume_from_checkpoint=True"), tmp_path)
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert min(resumed) in (5, 7, 9)
    assert resumed == {step: numbers for step, numbers in whole.items() if step >= min(resumed)}
