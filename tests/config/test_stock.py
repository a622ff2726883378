import difflib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training
from torchtune._recipe_registry import get_all_recipes

from hbp_tune.config import build, check_config
from hbp_tune.config.stock import is_stock_loss, missing_tokenizer_files
from hbp_tune.errors import ConfigError
from hbp_tune.models import adapt_decoder
from hbp_tune.parallel import Ulysses, describe_layouts
from hbp_tune.planning import check_groups
from hbp_tune.recipes import hbp_full_finetune_distributed

ROOT = Path(__file__).parents[2]
# torchtune forbids `import recipes`; its files may be read.
STOCK_ROOT = Path(importlib.util.find_spec("recipes").submodule_search_locations[0]) / "configs"
STOCK = [c.file_path for r in get_all_recipes() if r.name == "full_finetune_distributed" for c in r.configs]
RECIPE_SOURCE = inspect.getsource(hbp_full_finetune_distributed).replace("training.PROFILER_KEY", '"profiler"')

# Each key that means something else here: values with an effect, values without one, and what the error must recommend.
REFUSED: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], str]] = {
    "batch_size": ((1, 2, None), (), "groups[].pack_len and planner.tokens_per_step"),
    "gradient_accumulation_steps": ((1, 8), (), "planner.tokens_per_step"),
    "max_steps_per_epoch": ((10,), (None,), "max_steps"),
    "shuffle": ((False,), (None, True), "curriculum"),
    "collate_fn": (("torchtune.data.padded_collate_sft",), (None,), "packs replace batches"),
    "enable_activation_checkpointing": ((True,), (None, False), "groups[].ac_layers"),
    "ac_mode": (("selective",), (None, "full"), "groups[].ac_mode"),
    "ac_option": ((2, "op"), (None,), "groups[].ac_layers"),
    "enable_activation_offloading": ((True,), (None, False), "groups[].ac_mode=offload"),
    "optimizer_in_bwd": ((True,), (None, False), "fsdp_cpu_offload"),
    "tensor_parallel_dim": ((2,), (None, 1), "groups[].cp_degree"),
    "tensor_parallel_plan": (({"_component_": "torchtune.models.llama3.base_llama_tp_plan"},), (None,), "groups[].cp_degree"),
    "enable_async_checkpointing": ((True,), (None, False), "save_every_n_steps"),
}


def settings(**changes: Any) -> DictConfig:
    least = {
        "output_dir": "out",
        "tokenizer": {"_component_": "t"},
        "dataset": {"_component_": "d", "source": "json", "data_files": "data.jsonl"},
        "model": {"_component_": "m"},
        "checkpointer": {"_component_": "c"},
        "optimizer": {"_component_": "o"},
        "device": "cpu",
        "dtype": "fp32",
        "epochs": 1,
        "groups": [{"_component_": "hbp_tune.components.PackingGroup", "name": "all", "pack_len": 64}],
    }
    return OmegaConf.create(least | changes)


def stock_text(name: str) -> str:
    return (STOCK_ROOT / f"{name}.yaml").read_text()


def edit(text: str, edits: dict[str, str]) -> str:
    """Replace whole lines, found by how they start; "" removes one."""
    lines = []
    for line in text.splitlines(keepends=True):
        start = next((start for start in edits if line.startswith(start)), None)
        lines.append(line if start is None else edits[start])
    assert all(sum(line.startswith(start) for line in text.splitlines()) == 1 for start in edits)
    return "".join(lines)


LLAMA_EDITS = {
    "batch_size:": """\
groups:
  - {_component_: hbp_tune.components.PackingGroup, name: short, pack_len: 16384, cp_degree: 1, ac_layers: 28}
  - {_component_: hbp_tune.components.PackingGroup, name: long, pack_len: 131072, cp_degree: 8, ac_layers: 29}
""",
    "gradient_accumulation_steps:": "planner: {_component_: hbp_tune.components.BalancePlanner, tokens_per_step: 524288}\n",
    "enable_activation_checkpointing:": "",
}
QWEN_EDITS = {
    "batch_size:": """\
groups:
  - {_component_: hbp_tune.components.PackingGroup, name: short, pack_len: 8192, cp_degree: 1, ac_layers: 28}
  - {_component_: hbp_tune.components.PackingGroup, name: long, pack_len: 32768, cp_degree: 4, ac_layers: 28}
""",
    "gradient_accumulation_steps:": "planner: {_component_: hbp_tune.components.BalancePlanner, tokens_per_step: 524288}\n",
    "enable_activation_checkpointing:": "",
}
FEW_LINES = {"llama3_1/8B_full": LLAMA_EDITS, "qwen2_5/7B_full": QWEN_EDITS}


def unified_diff(name: str) -> str:
    before = stock_text(name)
    after = edit(before, FEW_LINES[name])
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"a/{name}.yaml", f"b/{name}.yaml"
    )
    return "".join(lines)


def changed_lines(diff: str) -> int:
    """Count the settings that a diff changes: a replaced line once, comments and blank lines not."""
    changed = 0
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        signs = [line[0] for line in hunk.splitlines() if line[0] in "+-" and line[1:].strip() and line[1:].lstrip()[0] != "#"]
        changed += max(signs.count("-"), signs.count("+"))
    return changed


def test_changed_lines_by_hand() -> None:
    assert changed_lines("--- a\n+++ b\n@@ -1 +1 @@\n-x: 1\n+x: 2\n+# why\n+\n y: 1\n@@ -9 +9 @@\n-z: 1\n") == 2


@pytest.mark.parametrize("path", STOCK)
def test_every_stock_key_is_read_or_refused(path: str) -> None:
    for key, value in OmegaConf.load(STOCK_ROOT / path).items():
        if key == "dataset":  # some set packed=True, which has a test of its own
            value.pop("packed", None)
        if re.search(rf'\bcfg\.{key}\b|"{key}"', RECIPE_SOURCE):
            assert key not in REFUSED
            check_config(settings(**{key: value}))
        else:
            harmful, harmless, _ = REFUSED[key]
            assert value in (*harmful, *harmless) or key in ("batch_size", "gradient_accumulation_steps", "collate_fn")


@pytest.mark.parametrize("path", STOCK)
def test_following_the_errors_turns_a_stock_config_into_ours(path: str) -> None:
    cfg = OmegaConf.load(STOCK_ROOT / path)
    cfg.dataset.pop("packed", None)
    removed = []
    with pytest.raises(ConfigError, match=r"^batch_size=\d of torchtune's stock recipe"):
        check_config(cfg)
    while len(removed) < len(REFUSED):
        try:
            check_config(cfg)
            break
        except ConfigError as error:
            if "'groups' is missing" in str(error):
                cfg.groups = settings().groups
                continue
            key, replacement = re.fullmatch(r"(\w+)=.* is not supported here; remove it: (.+)", str(error), re.DOTALL).groups()
            assert REFUSED[key][2] in replacement
            removed.append(key)
            del cfg[key]
    assert {"batch_size", "gradient_accumulation_steps"} <= set(removed) <= REFUSED.keys()
    assert is_stock_loss(cfg)


def test_the_list_of_refused_keys_is_complete() -> None:
    stock_recipe = (STOCK_ROOT.parent / "full_finetune_distributed.py").read_text()
    read = set(re.findall(r'\bcfg\.get\(\s*"(\w+)"|\bcfg\.([a-z]\w+)\b', stock_recipe))
    keys = {a or b for a, b in read} - {"get"}
    unread = {key for key in keys if not re.search(rf'\bcfg\.{key}\b|"{key}"', RECIPE_SOURCE)}
    assert unread <= REFUSED.keys()
    assert {"batch_size", "shuffle", "tensor_parallel_dim", "enable_async_checkpointing"} <= unread


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (harmful, _, _) in REFUSED.items() for value in harmful])
def test_a_refused_key_names_its_replacement(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}=.* is not supported here; remove it: .*{re.escape(REFUSED[key][2])}"):
        check_config(settings(**{key: value}))


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (_, harmless, _) in REFUSED.items() for value in harmless])
def test_a_stock_default_without_effect_passes(key: str, value: Any) -> None:
    check_config(settings(**{key: value}))


@pytest.mark.parametrize("name", FEW_LINES)
def test_a_stock_config_and_a_few_lines(name: str) -> None:
    assert changed_lines(unified_diff(name)) <= 12
    cfg = OmegaConf.create(edit(stock_text(name), FEW_LINES[name]))
    check_config(cfg)
    config.validate(cfg)
    groups = tuple(build("groups", group) for group in cfg.groups)
    check_groups(groups, world_size=8)
    assert build("planner", cfg.planner).tokens_per_step == 524288
    assert is_stock_loss(cfg)
    with training.set_default_dtype(torch.bfloat16), torch.device("meta"):
        parts = adapt_decoder(build("model", cfg.model))
    describe_layouts(Ulysses(), parts.heads, groups)
    assert groups[-1].pack_len <= parts.max_seq_len
    assert all(group.ac_layers <= len(parts.layers) for group in groups)


def test_the_documented_diff_is_the_tested_one() -> None:
    diff = unified_diff("llama3_1/8B_full")
    assert (ROOT / "docs" / "stock_llama3_1_8B.diff").read_text() == diff
    assert f"```diff\n{diff}```" in (ROOT / "docs" / "migration.md").read_text()


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("resume_from_chekpoint", "resume_from_checkpoint"),
        ("plannerr", "planner"),
        ("group", "groups"),
        ("batchsize", "batch_size"),
    ],
)
def test_a_misspelled_key_is_refused(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{typo}': did you mean '{meant}'"):
        check_config(settings(**{typo: 1}))


def test_a_misspelled_groups_says_so_rather_than_missing() -> None:
    cfg = settings()
    cfg.group = cfg.pop("groups")
    with pytest.raises(ConfigError, match="did you mean 'groups'"):
        check_config(cfg)


@pytest.mark.parametrize(
    "key", ["demo_dir", "model_dir", "data_dir", "checkpoint_dir", "run_name", "model_name", "my_lr", "note"]
)
def test_own_keys_for_interpolation_pass(key: str) -> None:
    check_config(settings(**{key: "x", "output_dir": f"${{{key}}}/out"}))


@pytest.mark.parametrize(
    "key", ["output_dir", "tokenizer", "dataset", "model", "checkpointer", "optimizer", "device", "dtype", "epochs"]
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"config key '{key}' is missing"):
        check_config(settings(**{key: None}))


@pytest.mark.parametrize("groups", [None, []])
def test_missing_groups_show_the_least_that_works(groups: Any) -> None:
    with pytest.raises(ConfigError, match="'groups' is missing; the least is groups: ") as caught:
        check_config(settings(groups=groups))
    least = OmegaConf.create(str(caught.value).partition("the least is ")[2])
    check_groups([build("groups", group) for group in least.groups], world_size=1)


@pytest.mark.parametrize(
    "key",
    [
        "epochs",
        "max_steps",
        "save_every_n_steps",
        "keep_last_n_checkpoints",
        "log_every_n_steps",
        "num_samples",
        "world_size",
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2.5, "two"])
def test_counts_are_whole_numbers(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{key}={value} must be a whole number of at least 1"):
        check_config(settings(**{key: value}))


@pytest.mark.parametrize("value", [-1, 2.5, "two"])
def test_no_step_at_all_may_be_skipped(value: Any) -> None:
    check_config(settings(max_nonfinite_steps=0))
    with pytest.raises(ConfigError, match=rf"max_nonfinite_steps={value} must be a whole number of at least 0, or null"):
        check_config(settings(max_nonfinite_steps=value))


def test_resuming_is_yes_no_or_auto() -> None:
    for value in (True, False, None, "auto"):
        check_config(settings(resume_from_checkpoint=value))
    with pytest.raises(ConfigError, match="resume_from_checkpoint=newest must be True, False, or auto: resume where there is"):
        check_config(settings(resume_from_checkpoint="newest"))


def test_what_only_planning_reads_does_not_disturb_training() -> None:
    planning = {"lengths": "lengths.csv", "lengths_column": "n", "num_samples": 9, "world_size": 64, "baselines": ["ffd"]}
    check_config(settings(**planning))
    with pytest.raises(ConfigError, match="unknown key 'lenghts': did you mean 'lengths'"):
        check_config(settings(lenghts="lengths.csv"))


def test_a_recipe_that_needs_less_asks_for_less() -> None:
    cfg = settings(dataset=None, checkpointer=None, device=None)
    check_config(cfg, ["output_dir", "model", "epochs"])
    for key in ("dataset", "checkpointer", "device"):
        del cfg[key]
    check_config(cfg, ["output_dir", "model", "epochs"])
    with pytest.raises(ConfigError, match="config key 'dataset' is missing"):
        check_config(cfg, ["model", "dataset"])


def test_packed_data_sets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dataset: packed=True is not supported here; remove it: groups decide"):
        check_config(settings(dataset={"_component_": "d", "packed": True}))
    with pytest.raises(ConfigError, match=r"dataset\[1\]: packed=True"):
        check_config(settings(dataset=[{"_component_": "d", "packed": False}, {"_component_": "d", "packed": True}]))
    check_config(settings(dataset=[{"_component_": "d", "packed": False}, {"_component_": "d"}]))


def test_stock_losses() -> None:
    chunked = "torchtune.modules.loss.CEWithChunkedOutputLoss"
    assert is_stock_loss(settings())
    assert is_stock_loss(settings(loss={"_component_": chunked, "num_output_chunks": 4}))
    assert is_stock_loss(settings(loss={"_component_": "torch.nn.CrossEntropyLoss"}))
    assert is_stock_loss(settings(loss={"_component_": None}))
    assert not is_stock_loss(settings(loss={"_component_": "hbp_tune.components.AveTokenLoss"}))
    with pytest.raises(
        ConfigError, match=r"loss.ignore_index of \S+CEWithChunkedOutputLoss .*; use hbp_tune.components.AveTokenLoss"
    ):
        is_stock_loss(settings(loss={"_component_": chunked, "ignore_index": 0}))


LLAMA, QWEN = "torchtune.models.llama3.llama3_tokenizer", "torchtune.models.qwen2_5.qwen2_5_tokenizer"


def missing(component: str, **arguments: Any) -> list[str]:
    return missing_tokenizer_files(settings(tokenizer={"_component_": component, **arguments}))


def test_files_of_a_tokenizer_that_was_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.model").write_text("")
    (tmp_path / "begun/.cache").mkdir(parents=True)
    here, away, begun = (str(tmp_path / name) for name in ("model/tokenizer.model", "none/merges.txt", "begun/tokenizer.model"))
    assert missing(QWEN, path=here, merges_file=away, max_seq_len=5) == [away]
    assert missing(LLAMA, path=here, special_tokens_path=None) == []
    assert missing(LLAMA, path=begun, special_tokens_path=away) == [begun, away]
    assert missing(LLAMA, path=str(tmp_path / "none/original/tokenizer.model")) != []
    assert missing(LLAMA, prompt_template="no.such.file") == []
    assert missing_tokenizer_files(settings(tokenizer="t")) == []
    assert missing("hbp_tune.components.HFTokenizer", path=str(tmp_path / "model")) == []
    assert missing("hbp_tune.components.HFTokenizer", path=str(tmp_path / "modl")) == [str(tmp_path / "modl")]


def test_a_file_that_the_models_folder_does_not_have(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "model.safetensors", ".hidden"):
        (tmp_path / name).write_text("")
    message = rf"^tokenizer.path={tmp_path}/tokeniser.model does not exist; the model's folder holds tokenizer.model"
    with pytest.raises(ConfigError, match=message):
        missing(LLAMA, path=str(tmp_path / "tokeniser.model"))
    message = r"original/q does not exist; the model's folder holds model.safetensors, tokenizer.model$"
    with pytest.raises(ConfigError, match=message):
        missing(LLAMA, path=str(tmp_path / "original/q"))
    with pytest.raises(ConfigError, match=rf"^tokenizer.path={tmp_path} is a folder; {LLAMA} names a file there"):
        missing(LLAMA, path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no 'llama3_tokenizr'; did you mean 'llama3_tokenizer'"):
        missing("torchtune.models.llama3.llama3_tokenizr", path="none/tokenizer.model")


def test_a_whole_component_on_the_command_line_is_refused_with_the_way_to_write_it() -> None:
    model = OmegaConf.create({"_component_": {"_component_": "torchtune.models.llama3_1.llama3_1", "num_layers": 2}})
    with pytest.raises(ConfigError, match=r"model=\{\.\.\.\} cannot .*; write model=torchtune.models.llama3_1.llama3_1 mod"):
        check_config(settings(model=model))


def test_a_value_of_ones_own_may_refer_to_what_is_not_there() -> None:
    check_config(settings(mine="${not.there}"))
