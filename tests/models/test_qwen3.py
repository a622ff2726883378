"""Qwen3 by torchtune's modules: transformers' logits, and the released models' sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hbp_tune.models import Qwen3Checkpointer, qwen3, qwen3_0_6b, qwen3_1_7b, qwen3_4b, qwen3_8b, qwen3_14b, qwen3_32b, with_yarn
from tests.models.tiny_qwen3 import HEAD_DIM, SMALL, write_checkpoint


def checkpointer(directory: Path, output: Path) -> Qwen3Checkpointer:
    return Qwen3Checkpointer(
        checkpoint_dir=str(directory), checkpoint_files=["model.safetensors"], output_dir=str(output), recipe_checkpoint=None
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_are_transformers_own_and_weights_go_back(tmp_path: Path, tied: bool) -> None:
    oracle = write_checkpoint(tmp_path / "model", tied=tied)
    files = checkpointer(tmp_path / "model", tmp_path / "out")
    weights = files.load_checkpoint()["model"]
    model = qwen3(**SMALL, head_dim=HEAD_DIM, max_seq_len=512, tie_word_embeddings=tied)
    model.load_state_dict(weights)
    tokens = torch.randint(0, 96, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = oracle(tokens).logits
        torch.testing.assert_close(model(tokens), want, atol=2e-4, rtol=1e-4)
        assert want.std() > 0.5, "logits that say something"
    files.save_checkpoint({"model": model.state_dict()}, epoch=0)
    written = load_file(tmp_path / "out/epoch_0/model-00001-of-00001.safetensors")
    source = load_file(tmp_path / "model/model.safetensors")
    assert {name: tensor for name, tensor in source.items() if not torch.equal(tensor, written[name])} == {}
    assert json.loads((tmp_path / "out/epoch_0/config.json").read_text())["model_type"] == "qwen3"


def test_the_norm_before_the_rotation_counts(tmp_path: Path) -> None:
    """Were it after, as torchtune's q_norm is, logits would be others: the checkpoint's norms are not all ones."""
    oracle = write_checkpoint(tmp_path / "model", tied=False)
    model = qwen3(**SMALL, head_dim=HEAD_DIM, max_seq_len=512)
    model.load_state_dict(checkpointer(tmp_path / "model", tmp_path / "out").load_checkpoint()["model"])
    for layer in model.layers:
        attention = layer.attn
        attention.q_norm, attention.k_norm = attention.q_proj.norm, attention.k_proj.norm
        attention.q_proj.norm = attention.k_proj.norm = torch.nn.Identity()
    tokens = torch.randint(0, 96, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(tokens) - oracle(tokens).logits).abs().max() > 0.05


@pytest.mark.parametrize(
    ("build", "billions"),
    [(qwen3_0_6b, 0.596), (qwen3_1_7b, 1.721), (qwen3_4b, 4.022), (qwen3_8b, 8.191), (qwen3_14b, 14.768), (qwen3_32b, 32.762)],
)
def test_sizes_of_the_released_models(build: Any, billions: float) -> None:
    with torch.device("meta"):
        model = build()
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=6e-4)
    assert model.max_seq_len == 40_960


def test_yarn_stretches_it_too() -> None:
    with torch.device("meta"):
        assert with_yarn(qwen3_0_6b(), 4.0, original_max_position_embeddings=32_768).max_seq_len == 131_072


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", tied=False)
    save_file({"model.layers.0.self_attn.else.weight": torch.ones(1)}, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match="unexpected key"):
        checkpointer(tmp_path / "model", tmp_path / "out").load_checkpoint()
