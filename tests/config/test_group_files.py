from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hbp_tune.config.group_files import groups_of, write_groups
from hbp_tune.errors import ConfigError
from hbp_tune.planning.plans.records import PackingGroup

GROUPS = (
    PackingGroup(name="8K", pack_len=8192),
    PackingGroup(name="128K", pack_len=131_072, cp_degree=8, ac_layers=13, ac_mode="selective"),
)
OTHERS = {"groups": [{"_component_": "hbp_tune.components.PackingGroup", "name": "all", "pack_len": 64}]}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "groups.yaml"
    write_groups(path, GROUPS, ["chosen for 32 ranks", "modelled"])
    assert path.read_text().startswith(
        "# chosen for 32 ranks\n# modelled\ngroups:\n  - {_component_: hbp_tune.components.Packing"
    )
    assert groups_of(OmegaConf.create({"groups_file": str(path)})) == GROUPS
    assert groups_of(OmegaConf.create(OTHERS | {"groups_file": str(path)})) == GROUPS, "the file replaces the key"


def test_without_a_file() -> None:
    assert groups_of(OmegaConf.create(OTHERS)) == (PackingGroup(name="all", pack_len=64),)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"groups_file=.*no.yaml does not exist; `tune run hbp_plan --config ... groups=auto` or hbp_profile_groups writes",
    ):
        groups_of(OmegaConf.create({"groups_file": str(tmp_path / "no.yaml")}))


@pytest.mark.parametrize("text", ["groups: []", "groups: 3", "- 1", "other: [1]", ""])
def test_a_file_without_groups(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"groups_file=.*bad.yaml has no list `groups`; it must look like the key"):
        groups_of(OmegaConf.create({"groups_file": str(tmp_path / "bad.yaml")}))


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("groups: [")
    with pytest.raises(ConfigError, match=r"groups_file=.*bad.yaml cannot be read: while parsing a flow node"):
        groups_of(OmegaConf.create({"groups_file": str(tmp_path / "bad.yaml")}))


def test_a_word_is_no_list_of_groups() -> None:
    with pytest.raises(ConfigError, match=r"groups=auto is not a list of groups; choose them by `tune run hbp_plan"):
        groups_of(OmegaConf.create({"groups": "auto"}))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"groups_file={tmp_path} is a folder; name the file in it, such as .*groups.yaml"):
        groups_of({"groups_file": str(tmp_path)})
