"""`tune run hbp_profile_groups` as users start it: killed half-way, started again, and its groups trained."""

import json
import time
from pathlib import Path

import pytest

from hbp_tune.demo import prepare_demo
from tests.launching import end_of, losses, ranks_of, run, start, tune

pytestmark = pytest.mark.slow


def measurements_of(profile: Path) -> list[object]:
    """Read what a profile holds, as soon as it is there."""
    return json.loads(profile.read_text())["measurements"] if profile.exists() else []


def test_a_killed_profile_goes_on_where_it_stopped_and_its_groups_train(tmp_path: Path) -> None:
    demo = prepare_demo(tmp_path / "hbp_demo", num_samples=150, max_tokens=1000).directory
    common = ["--config", "demo/tiny_llama_cpu", f"demo_dir={demo}"]
    command = tune(*common, "profile.shortest=512", "profile.repeats=2", name="hbp_profile_groups")
    profile = tmp_path / "hbp_runs/demo/profile.json"
    launcher = start(command, tmp_path)
    limit = time.monotonic() + 120
    while len(measurements_of(profile)) < 3:
        assert time.monotonic() < limit
        time.sleep(0.05)
    ranks_of(launcher)[0].kill()  # it writes the profile
    end_of(launcher, code=1)
    saved = measurements_of(profile)
    output = run(command, tmp_path)
    assert f"{len(saved)} measurements of hbp_runs/demo/profile.json are used again" in output
    assert measurements_of(profile)[: len(saved)] == saved
    assert len(measurements_of(profile)) > len(saved)
    assert "Written: hbp_runs/demo/groups.yaml; train with groups_file=hbp_runs/demo/groups.yaml" in output
    run(tune(*common, "groups_file=hbp_runs/demo/groups.yaml", "max_steps=2", "output_dir=trained"), tmp_path)
    assert len(losses(tmp_path / "trained")) == 2
