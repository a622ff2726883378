import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torchtune import _recipe_registry

from hbp_tune.cli.__main__ import expand, main
from hbp_tune.cli.registry import PLAN, PROFILE, TRAIN, find, register
from hbp_tune.config.packaged import packaged_configs
from hbp_tune.errors import ConfigError
from hbp_tune.recipes import hbp_full_finetune_distributed


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave torchtune's registry and the arguments of the tests as they were."""
    monkeypatch.setattr(_recipe_registry, "_ALL_RECIPES", list(_recipe_registry._ALL_RECIPES))
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def test_ours_are_listed_before_torchtunes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == main(["ls"]) == 0
    out = capsys.readouterr().out
    once = out[: len(out) // 2]
    assert out == 2 * once, "registered once"
    recipes = [line.split()[0] for line in once.splitlines()[1:] if not line.startswith(" ")]
    assert recipes[:3] == [TRAIN, PROFILE, PLAN]
    assert "full_finetune_distributed" in recipes
    assert all(f" {name}" in once for name in packaged_configs())


def test_copies_are_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["cp", TRAIN, str(tmp_path / "mine.py")])
    main(["cp", "llama3_1/8B_hbp_full", str(tmp_path / "mine.yaml")])
    main(["cp", "llama3_1/8B_full", str(tmp_path / "theirs.yaml")])
    assert (tmp_path / "mine.py").read_text() == Path(hbp_full_finetune_distributed.__file__).read_text()
    assert (tmp_path / "mine.yaml").read_text() == packaged_configs()["llama3_1/8B_hbp_full"].read_text()
    assert "batch_size" in (tmp_path / "theirs.yaml").read_text()
    main(["cat", "llama3_1/8B_hbp_full"])
    assert "pack_len: 131072" in capsys.readouterr().out


def test_a_configuration_is_found_by_path_and_by_name(tmp_path: Path) -> None:
    register()
    (tmp_path / "own.yaml").write_text("a: 1\n")
    assert find(str(tmp_path / "own.yaml")) == tmp_path / "own.yaml"
    assert find("qwen2_5/7B_hbp_full") == packaged_configs()["qwen2_5/7B_hbp_full"]
    assert OmegaConf.load(find("qwen2_5/7B_full_single_device")).batch_size
    with pytest.raises(ConfigError, match="qwen9: no such file, and no configuration; `hbp ls` lists them"):
        find("qwen9")


def test_short_commands_in_full() -> None:
    assert expand(["plan", "--config", "x", "seed=1"]) == ["run", PLAN, "--config", "x", "seed=1"]
    assert expand(["profile", "--nproc_per_node", "8", "--config", "x"]) == [
        *("run", "--nproc_per_node", "8", PROFILE, "--config", "x")
    ]
    for same in (["ls"], ["plan", "--help"], ["run", PLAN]):
        assert expand(same) == same


@pytest.mark.parametrize(
    "command", ["download", "ls", "cp", "cat", "run", "validate", "plan", "profile", "report", "convert", "doctor"]
)
def test_help_teaches_hbp(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert f"hbp {command}" in out
    assert "tune ls" not in out
    assert "tune cp" not in out


def test_help_of_all_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for command in (
        "download",
        "ls",
        "cp",
        "cat",
        "run",
        "validate",
        "plan",
        "profile",
        "report",
        "eval",
        "demo",
        "convert",
        "doctor",
    ):
        assert f"\n    {command}" in out
    assert max(map(len, out.splitlines())) <= 80, "on a terminal of 80 columns"


def test_the_demo_speaks_of_hbp(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    out = capsys.readouterr().out
    assert "hbp demo --num-samples 200" in out


def test_what_the_user_can_mend_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "nothing"]) == 2
    assert capsys.readouterr().err == "error: nothing: no such file, and no configuration; `hbp ls` lists them\n"


def test_nobody_reads_on() -> None:
    command = f"{sys.executable} -m hbp_tune.cli ls | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("RECIPE")
    assert "Error" not in done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("command", ["validate", "convert"])
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    assert main([command, str(tmp_path / "bad.yaml"), *([str(tmp_path / "new.yaml")] if command == "convert" else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/bad.yaml is not valid YAML: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "new.yaml").exists()


def test_a_list_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert main(["validate", str(tmp_path / "list.yaml")]) == 2
    assert "must hold a mapping of keys to values" in capsys.readouterr().err
