from dataclasses import replace
from pathlib import Path

import pytest

from hbp_tune.errors import ConfigError
from hbp_tune.planning.costs.measurements import Measurement
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.reporting.files.profile_files import Profile, check_same, read_profile, write_profile

GROUP = PackingGroup(name="1K", pack_len=1024, cp_degree=2, ac_layers=3)
RUN = Measurement(group=GROUP, world_size=4, doc_lens=(512, 512), micro_step_s=0.25, peak_gib=1.5)
OUT = Measurement(group=replace(GROUP, ac_layers=0), world_size=4, doc_lens=(1024,), micro_step_s=None, peak_gib=None)
PROFILE = Profile(
    machine={"device": "GPU", "ranks": 4}, model={"num_layers": 8}, versions={"torch": "2.13.0"}, measurements=(RUN, OUT)
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_profile(tmp_path / "new" / "profile.json", PROFILE)
    assert read_profile(tmp_path / "new" / "profile.json") == PROFILE
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["profile.json"], "nothing is left aside"
    assert read_profile(tmp_path / "other.json") is None


def test_a_measurement_is_found_by_what_was_run() -> None:
    assert PROFILE.find(replace(GROUP, name="other"), [512, 512]) == RUN
    assert PROFILE.find(GROUP, [1024]) is None
    assert PROFILE.find(replace(GROUP, ac_mode="selective"), [512, 512]) is None
    assert PROFILE.find(replace(GROUP, ac_layers=0), [1024]) == OUT


@pytest.mark.parametrize("text", ["", "{}", '{"measurements": [{"group": 1}]}'])
def test_a_file_that_is_no_profile(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=r"bad.json is not a profile of groups: .*; remove it, or set profile.file"):
        read_profile(tmp_path / "bad.json")


def test_another_machine_or_model_is_refused(tmp_path: Path) -> None:
    check_same(PROFILE, replace(PROFILE, versions={"torch": "2.11.0"}), tmp_path)
    with pytest.raises(ConfigError, match=r"was measured with machine.ranks=4, this run has 8: .* profile.force=True"):
        check_same(PROFILE, replace(PROFILE, machine={"device": "GPU", "ranks": 8}), tmp_path)
    with pytest.raises(ConfigError, match=r"was measured with model.num_layers=8, this run has None"):
        check_same(PROFILE, replace(PROFILE, model={}), tmp_path)
