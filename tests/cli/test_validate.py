import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hbp_tune.cli.__main__ import main
from hbp_tune.config.packaged import packaged_configs
from tests.helpers import launch_world_size


@pytest.mark.parametrize("name", packaged_configs())
def test_all_packaged_configurations_are_well_formed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    gpu, ranks = "H200" if "single" in name else "H100", launch_world_size(name)
    assert main(["validate", name, "--gpu", gpu, "--world-size", str(ranks)]) == 0
    out = capsys.readouterr().out
    assert f"{name} is well-formed." in out
    assert "warning" not in out, "the groups fit"


def test_configurations_of_torchtunes_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "llama3_1/8B_full"]) == 0
    assert "it is for a recipe of torchtune's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "way"),
    [
        ("ac_layers: 0}", "ac_layers: 32}", r"ac_layers=0 for '8K' and ac_layers=0 for '64K' would fit, and recompute less"),
        ("pack_len: 8192", "pack_len: 4096", "longer packs or a smaller cp_degree would use it"),
    ],
)
def test_memory_that_stays_unused_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, way: str
) -> None:
    text = packaged_configs()["llama3_1/8B_hbp_full"].read_text().replace(old, new)
    (tmp_path / "my.yaml").write_text(re.sub(r"\n.*name: (128K|64K, pack_len: 65536, cp_degree: 8, ac_layers: 0).*", "", text))
    assert main(["validate", str(tmp_path / "my.yaml")]) == 0
    pattern = r"note: over a third of an H100 stays unused, a step takes (\S+) of 80 GiB; (.*)\. `hbp plan` with"
    told = re.search(pattern, capsys.readouterr().out)
    assert told
    assert float(told[1]) < 80 * 2 / 3
    assert told[2] == way


def test_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "llama3_1/8B_hbp_full", "--gpu", "L4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["config"], found["world_size"], found["gpu"], found["memory_gib"]) == ("llama3_1/8B_hbp_full", 8, "L4", 24)
    assert [(group["name"], group["pack_len"], group["cp_degree"]) for group in found["groups"]] == [
        ("8K", 8192, 1),
        ("64K", 65536, 8),
        ("128K", 131072, 8),
    ]
    assert all(group["peak_gib"] > 24 for group in found["groups"])
    assert found["notes"][0].startswith("warning: ")
    assert main(["validate", "llama3_1/8B_full", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"config": "llama3_1/8B_full"}


def test_too_little_memory_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "llama3_1/8B_hbp_full", "--gpu", "L4"]) == 0
    assert re.search(r"warning: \d+\.\d GiB are needed, an L4 has 24; raise ac_layers", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cp_degree: 8", "cp_degree: 3", "cp_degree"),
        ("ac_layers: 19", "ac_layers: 33", "33"),
        ("curriculum:\n", "curiculum:\n", "did you mean 'curriculum'"),
        ("torchtune.models.llama3_1.llama3_1_8b", "torchtune.models.llama3_1.llama3_1_8", "llama3_1_8"),
        ("weight_decay: 0.01", "weight_decai: 0.01", "weight_decai"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str) -> None:
    text = packaged_configs()["llama3_1/8B_hbp_full"].read_text()
    assert old in text
    (tmp_path / "my.yaml").write_text(text.replace(old, new))
    assert main(["validate", str(tmp_path / "my.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_a_terminal_with_few_letters() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "hbp_tune.cli", "validate", "llama3_2/1B_hbp_full"]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="ascii", check=False)
    assert done.returncode == 0, done.stderr
    assert "+--" in done.stdout
