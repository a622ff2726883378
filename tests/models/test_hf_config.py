"""An exported config.json is true of the trained model, and otherwise the checkpoint's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchtune.models.gemma import gemma_2b
from torchtune.models.llama2 import llama2_7b
from torchtune.models.llama3 import llama3_8b
from torchtune.models.llama3_1 import llama3_1, llama3_1_8b
from torchtune.models.llama3_2 import llama3_2_1b
from torchtune.models.llama3_3 import llama3_3_70b
from torchtune.models.mistral import mistral_7b
from torchtune.models.phi3 import phi3_mini
from torchtune.models.qwen2 import qwen2, qwen2_7b
from torchtune.models.qwen2_5 import qwen2_5_7b_base, qwen2_5_7b_instruct
from torchtune.modules import TransformerDecoder

from hbp_tune.errors import ConfigError
from hbp_tune.models import HFConfig, with_yarn
from hbp_tune.models.hf_config import model_positions

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
# What the checkpoints' own files say of positions.
CHECKPOINTS: list[tuple[Callable[[], TransformerDecoder], dict[str, Any]]] = [
    (llama2_7b, {"max_position_embeddings": 4096, "rope_scaling": None}),
    (llama3_8b, {"max_position_embeddings": 8192, "rope_scaling": None, "rope_theta": 500000.0}),
    (llama3_1_8b, {"max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0, **LLAMA3}, "rope_theta": 500000.0}),
    (llama3_2_1b, {"max_position_embeddings": 131072, "rope_scaling": {"factor": 32.0, **LLAMA3}, "rope_theta": 500000.0}),
    (llama3_3_70b, {"max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0, **LLAMA3}, "rope_theta": 500000.0}),
    (qwen2_7b, {"max_position_embeddings": 131072, "rope_theta": 1000000.0}),
    (qwen2_5_7b_base, {"max_position_embeddings": 131072, "rope_theta": 1000000.0}),
    (qwen2_5_7b_instruct, {"max_position_embeddings": 32768, "rope_theta": 1000000.0}),
    (mistral_7b, {"max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096}),
    (
        phi3_mini,
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rope_scaling": None,
            "rope_theta": 10000.0,
        },
    ),
    (gemma_2b, {"max_position_embeddings": 8192, "rope_theta": 10000.0}),
]
TINY = {"vocab_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 16, "intermediate_dim": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
OLDER = {"model_type": "qwen2", "max_position_embeddings": 64, "rope_theta": 1000000.0, "vocab_size": 32}
NEWER = {
    "model_type": "qwen2",
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "max_position_embeddings": 64,
    "name": "Qwen ∞",
}


def plain(max_seq_len: int = 64) -> TransformerDecoder:
    return qwen2(**TINY, max_seq_len=max_seq_len)


def yarn(**settings: Any) -> TransformerDecoder:
    return with_yarn(plain(), **({"factor": 4.0} | settings))


def newer_words(config: dict[str, Any]) -> dict[str, Any]:
    """Say the same with ``rope_parameters``, as transformers does from version 5 on."""
    rest = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_theta")}
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    return rest | {"rope_parameters": {**scaling, "rope_theta": config.get("rope_theta", 10000.0)}}


def open_config(folder: Path, config: dict[str, Any], model: nn.Module) -> HFConfig:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "out/epoch_0").mkdir(parents=True, exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(config, indent=3))  # of a checkpoint with its own layout
    return HFConfig(folder / "model", model)


def exported(folder: Path, config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    open_config(folder, config, model).write(folder / "out/epoch_0")
    assert [path.name for path in (folder / "out/epoch_0").iterdir()] == ["config.json"]
    result: dict[str, Any] = json.loads((folder / "out/epoch_0/config.json").read_text())
    return result


@pytest.mark.parametrize("words", [dict, newer_words], ids=["older", "newer"])
@pytest.mark.parametrize(("builder", "config"), CHECKPOINTS, ids=[builder.__name__ for builder, _ in CHECKPOINTS])
def test_the_checkpoints_own_file_is_true_and_stays(
    tmp_path: Path, builder: Callable[[], TransformerDecoder], config: dict[str, Any], words: Callable[..., dict[str, Any]]
) -> None:
    with torch.device("meta"):
        file = open_config(tmp_path, words(config), builder())
    assert file.differences() == []
    file.write(tmp_path / "out/epoch_0")
    assert (tmp_path / "out/epoch_0/config.json").read_bytes() == (tmp_path / "model/config.json").read_bytes()


@pytest.mark.parametrize(
    ("config", "model", "changes"),
    [
        pytest.param(OLDER, yarn, {"rope_scaling": YARN, "max_position_embeddings": 256}, id="yarn"),
        pytest.param(
            NEWER,
            yarn,
            {"rope_parameters": {"rope_theta": 1000000.0, **YARN}, "max_position_embeddings": 256},
            id="yarn in newer words",
        ),
        pytest.param(
            OLDER | {"rope_scaling": YARN, "max_position_embeddings": 256},
            lambda: yarn(factor=2, beta_fast=16, attention_factor=1),
            {"rope_scaling": {**YARN, "factor": 2.0, "beta_fast": 16.0, "beta_slow": 1.0, "attention_factor": 1.0}},
            id="another yarn",
        ),
        pytest.param(OLDER | {"rope_scaling": YARN}, plain, {"rope_scaling": None}, id="plain for yarn"),
        pytest.param(
            newer_words(OLDER | {"rope_scaling": YARN}),
            plain,
            {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}},
            id="plain for yarn in newer words",
        ),
        pytest.param(
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
                "max_position_embeddings": 131072,
            },
            phi3_mini,
            {"rope_scaling": None},
            id="plain for longrope",
        ),
        pytest.param(
            {"max_position_embeddings": 8192, "rope_theta": 500000.0},
            llama3_1_8b,
            {"rope_scaling": {**LLAMA3, "factor": 8.0}, "max_position_embeddings": 131072},
            id="llama3 for plain",
        ),
        pytest.param(
            {"rope_scaling": {**LLAMA3, "factor": 8.0}, "max_position_embeddings": 131072, "rope_theta": 500000.0},
            llama3_2_1b,
            {"rope_scaling": {**LLAMA3, "factor": 32.0}},
            id="llama3 by another factor",
        ),
        pytest.param(OLDER, lambda: plain(128), {"max_position_embeddings": 128}, id="more positions"),
        pytest.param({"rope_theta": 1e6}, plain, {"max_position_embeddings": 64}, id="positions are not said"),
        pytest.param(OLDER, lambda: plain(32), {}, id="fewer positions"),
        pytest.param(
            OLDER | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_slow": None}},
            yarn,
            {"max_position_embeddings": 256},
            id="the same yarn in older words",
        ),
        pytest.param(
            OLDER | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            yarn,  # without its original positions, raising max_position_embeddings would change what it means
            {"rope_scaling": YARN, "max_position_embeddings": 256},
            id="yarn of all positions",
        ),
        pytest.param(OLDER | {"rope_scaling": {"type": "default"}}, plain, {}, id="default is plain"),
    ],
)
def test_what_is_not_true_is_written_and_said(
    tmp_path: Path, config: dict[str, Any], model: Callable[[], TransformerDecoder], changes: dict[str, Any]
) -> None:
    with torch.device("meta"):
        built = model()
    result = exported(tmp_path, config, built)
    assert result == config | changes
    assert list(result) == [*config, *(name for name in changes if name not in config)]
    lines = open_config(tmp_path, config, built).differences()
    assert sorted(line.split(": ")[1].split()[0] for line in lines) == sorted(changes)
    assert open_config(tmp_path, result, built).differences() == [], "a run from the export has nothing to say"


def test_a_difference_names_file_both_values_and_the_way_out(tmp_path: Path) -> None:
    assert open_config(tmp_path, OLDER | {"rope_scaling": YARN}, plain()).differences() == [
        f"{tmp_path}/model/config.json: rope_scaling is {json.dumps(YARN)}, the model is built with null: it is trained so, and "
        f"the exported config.json will say so; if the checkpoint's is meant, change model"
    ]


@pytest.mark.parametrize("words", [dict, newer_words], ids=["older", "newer"])
@pytest.mark.parametrize(
    ("builder", "config", "message"),
    [
        # Mistral 7B from v0.2 on; Phi-4, whose builder in torchtune takes Phi-3's base.
        (
            mistral_7b,
            {"rope_theta": 1000000.0},
            r"rope_theta=1000000.0 \(config.json\), the model is built with 10000.0; .*rope_b",
        ),
        (phi3_mini, {"rope_theta": 250000}, r"rope_theta=250000 \(config.json\), .* with 10000.0; .* with rope_base: 250000"),
        (llama3_8b, {}, r"rope_theta=10000.0 \(config.json\), the model is built with 500000.0;"),
    ],
    ids=["mistral", "phi4", "llama"],
)
def test_another_rope_base_is_refused(
    tmp_path: Path,
    builder: Callable[[], TransformerDecoder],
    config: dict[str, Any],
    message: str,
    words: Callable[..., dict[str, Any]],
) -> None:
    with torch.device("meta"):
        model = builder()
    with pytest.raises(ConfigError, match=message):
        open_config(tmp_path, words(config), model)


def test_an_earlier_runs_file_is_replaced(tmp_path: Path) -> None:
    exported(tmp_path, OLDER, yarn())
    assert exported(tmp_path, OLDER, plain()) == OLDER
    assert exported(tmp_path, NEWER, yarn())["name"] == "Qwen ∞"


def test_unknown_positions_leave_the_file_alone(tmp_path: Path) -> None:
    model = llama3_1(**TINY, max_seq_len=64)
    for layer in model.layers:
        layer.attn.pos_embeddings = nn.Identity()
    assert model_positions(model) is None
    assert open_config(tmp_path, OLDER, model).differences() == [
        f"{tmp_path}/model/config.json is exported as it is: what it says of positions is not compared with Identity"
    ]
    assert exported(tmp_path, OLDER, model) == OLDER


@pytest.mark.parametrize("config", [OLDER, NEWER], ids=["older", "newer"])
def test_transformers_reads_what_is_written(tmp_path: Path, config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    exported(tmp_path, config, yarn())
    read = transformers.AutoConfig.from_pretrained(tmp_path / "out/epoch_0")
    assert read.rope_parameters == YARN | {"rope_theta": 1000000.0}
    assert read.max_position_embeddings == 256
    exported(tmp_path, {"model_type": "llama"}, llama3_1(**TINY, max_seq_len=64, rope_base=10_000))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out/epoch_0").rope_parameters["rope_theta"] == 10000.0
