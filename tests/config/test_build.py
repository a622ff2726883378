import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from hbp_tune.config import build, build_setting, setting
from hbp_tune.errors import ConfigError
from hbp_tune.planning import ISF, PackingGroup, StepProfile

GROUP = "hbp_tune.components.PackingGroup"


def test_builds_with_arguments_of_the_caller() -> None:
    node = OmegaConf.create({"_component_": GROUP, "name": "short", "pack_len": 64})
    assert build("groups", node) == PackingGroup(name="short", pack_len=64)
    assert build("groups", node, ac_layers=2, pack_len=128) == PackingGroup(name="short", pack_len=128, ac_layers=2)


def test_what_a_key_was_set_to() -> None:
    """Merge overrides as torchtune's command line does: a key with a component takes a word as the component's name."""
    planner, lines = {"_component_": "hbp_tune.components.BalancePlanner", "mode": "paper"}, {"plain": "auto", "empty": None}
    cfg = OmegaConf.create({"planner": planner, "curriculum": dict(planner), "scheme": dict(planner), **lines})
    cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist(["curriculum._component_=null", "scheme._component_=ulysses"]))
    assert setting(cfg, "planner") == planner
    assert [setting(cfg, key) for key in ("curriculum", "scheme", "plain", "empty", "absent")] == [
        None,
        "ulysses",
        "auto",
        None,
        None,
    ]
    cfg.planner.pop("_component_")
    with pytest.raises(ConfigError, match=r"config key 'planner' \(no _component_\) cannot be built"):
        build("planner", setting(cfg, "planner"))


def test_a_setting_is_built_or_its_default_made() -> None:
    cfg = OmegaConf.create(
        {"planner": {"_component_": "hbp_tune.components.BalancePlanner", "mode": "paper"}, "scheme": "ulysses"}
    )
    assert build_setting(cfg, "planner", default=ISF).mode == "paper"
    assert isinstance(build_setting(cfg, "packer", default=ISF), ISF)
    assert build_setting(cfg, "packer") is None
    assert build_setting(cfg, "scheme", default="auto") == "ulysses"
    assert build_setting(cfg, "other", default="auto") == "auto"
    with pytest.raises(ConfigError, match="config key 'scheme'"):
        build_setting(cfg, "scheme", default=ISF)


def test_a_list_of_mappings_is_an_argument() -> None:
    stages = [{"steps": 1, "max_pack_len": 64}, {"steps": "${warm_steps}", "max_pack_len": 128}]
    cfg = OmegaConf.create({"warm_steps": 2, "curriculum": {"_component_": "hbp_tune.components.Staged", "stages": stages}})
    pack_lens = np.array([64, 64, 128, 128, 256])
    steps = StepProfile(pack_lens, pack_lens.astype(np.int32))
    assert build("curriculum", cfg.curriculum).order(steps, first_step=0, epoch=0, seed=0).tolist() == [0, 2, 1, 3, 4]


def test_components_inside_components_are_built_first() -> None:
    planner = {"_component_": "hbp_tune.components.BalancePlanner", "mode": "paper", "tokens_per_step": "${tokens}"}
    cfg = OmegaConf.create({"tokens": 64, "planner": {**planner, "packer": {"_component_": "hbp_tune.components.ISF"}}})
    built = build("planner", cfg.planner)
    assert isinstance(built.packer, ISF)
    assert built.tokens_per_step == 64
    cfg.planner.packer._component_ = "hbp_tune.components.IFS"
    with pytest.raises(ConfigError, match=r"^config key 'planner.packer' \(hbp_tune.components.IFS\) cannot be built"):
        build("planner", cfg.planner)


@pytest.mark.parametrize(
    ("key", "node", "reason"),
    [
        ("groups", {"_component_": "hbp_tune.components.PackGroup"}, "did you mean 'PackingGroup'"),
        ("planner", {"_component_": "hbp_tuna.BalancePlanner"}, "there is no module 'hbp_tuna'"),
        (
            "tokenizer",
            {"_component_": "torchtune.models.llama3.llama3_tokenizr"},
            "torchtune.models.llama3 has no 'llama3_tokenizr'; did you mean 'llama3_tokenizer'",
        ),
        ("loss", {"_component_": "torch..x"}, "torch has no ''"),
        (
            "groups",
            {"_component_": GROUP, "name": "a", "pack_length": 8},
            "TypeError: .*unexpected keyword argument 'pack_length'",
        ),
        ("groups", {"_component_": GROUP, "name": "a"}, "TypeError: .*missing 1 required keyword-only argument: 'pack_len'"),
        ("tokenizer", {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "no/such.model"}, "no/such.model"),
        ("optimizer", {"_component_": "torch.optim.AdamW"}, "TypeError: .*'params'"),
    ],
)
def test_an_error_names_key_and_component_and_no_place_in_libraries(key: str, node: dict[str, Any], reason: str) -> None:
    component = re.escape(node["_component_"])
    message = rf"^config key '{key}' \({component}\) cannot be built: .*{reason}"
    with pytest.raises(ConfigError, match=message) as caught:
        build(key, OmegaConf.create(node))
    assert "\n" not in str(caught.value)
    assert ".py" not in str(caught.value)


def test_an_error_names_the_line_of_the_users_own_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parts.py").write_text("import json\ndef part(text):\n    return json.loads(text)\n")
    (tmp_path / "own_broken.py").write_text("\nimport no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"JSONDecodeError: .* \[{tmp_path}/own_parts.py:3\]$"):
        build("loss", OmegaConf.create({"_component_": "own_parts.part", "text": "{"}))
    with pytest.raises(ConfigError, match=rf"No module named 'no_such_library' \[{tmp_path}/own_broken.py:2\]$"):
        build("loss", OmegaConf.create({"_component_": "own_broken.part"}))


def test_a_component_left_out_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^config key 'loss' \(no _component_\) cannot be built: "):
        build("loss", OmegaConf.create({"chunks": 8}))


def test_a_key_without_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^config key 'groups' is empty; give it a _component_"):
        build("groups", None)


def test_a_bare_string_is_no_component() -> None:
    with pytest.raises(ConfigError, match=r"^config key 'loss' \(AveTokenLoss\) cannot be built: "):
        build("loss", "AveTokenLoss")


def test_errors_of_our_own_stay_as_they_are() -> None:
    with pytest.raises(ConfigError, match=r"^group 'odd': pack_len=7 must be a multiple of 2 \* cp_degree=2"):
        build("groups", OmegaConf.create({"_component_": GROUP, "name": "odd", "pack_len": 7}))
