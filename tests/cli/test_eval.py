from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hbp_tune.cli.__main__ import main


def exported(directory: Path, *epochs: int) -> Path:
    """Make a run's folder with empty weights."""
    for epoch in epochs:
        (directory / f"epoch_{epoch}").mkdir(parents=True)
        for shard in (2, 1):
            (directory / f"epoch_{epoch}" / f"model-0000{shard}-of-00002.safetensors").touch()
    return directory


@pytest.mark.parametrize("name", ["llama3_1/8B_hbp_full", "qwen3/8B_hbp_full"])
def test_the_newest_checkpoint_of_a_run_is_evaluated(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = exported(tmp_path / "run", 2, 10)
    assert main(["eval", name, f"output_dir={run}", "tasks=[hellaswag]", "limit=5"]) == 0
    path = run / "eleuther_eval.yaml"
    assert f"tune run eleuther_eval --config {path}" in capsys.readouterr().out
    cfg = OmegaConf.load(path)
    assert cfg.checkpointer.checkpoint_dir == str(run / "epoch_10")
    assert cfg.checkpointer.checkpoint_files == [f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2)]
    assert (cfg.tasks, cfg.limit, cfg.dtype, cfg.quantizer) == (["hellaswag"], 5, "bf16", None)
    assert "${" not in path.read_text()
    assert "groups" not in cfg


def test_another_folder_and_file(tmp_path: Path) -> None:
    checkpoint = exported(tmp_path / "run", 0) / "epoch_0"
    path = tmp_path / "elsewhere" / "eval.yaml"
    assert main(["eval", "demo/tiny_llama_cpu", "--checkpoint", str(checkpoint), "--to", str(path)]) == 0
    assert OmegaConf.load(path).device == "cpu"


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "demo/tiny_llama_cpu", f"output_dir={tmp_path}"]) == 2
    assert f"error: {tmp_path} has no epoch_N, which a run exports at its end" in capsys.readouterr().err
    assert main(["eval", "demo/tiny_llama_cpu", "--checkpoint", str(tmp_path)]) == 2
    assert f"error: {tmp_path} holds no *.safetensors" in capsys.readouterr().err
    assert main(["eval", "demo/tiny_llama_cpu", "hellaswag"]) == 2
    assert "error: 'hellaswag' is not an override; write key=value" in capsys.readouterr().err
