"""A small Qwen3 checkpoint by transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
# The heads are together wider than the residual stream, as in Qwen3-0.6B, 4B and 32B.
SMALL = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48, "vocab_size": 128}
HEAD_DIM = 16


def write_checkpoint(directory: Path, *, tied: bool) -> Any:
    """Write a random Qwen3 checkpoint, and give transformers' model."""
    config = transformers.Qwen3Config(
        vocab_size=SMALL["vocab_size"],
        hidden_size=SMALL["embed_dim"],
        intermediate_size=SMALL["intermediate_dim"],
        num_hidden_layers=SMALL["num_layers"],
        num_attention_heads=SMALL["num_heads"],
        num_key_value_heads=SMALL["num_kv_heads"],
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # so that attention is far from even, and positions count
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones would commute with rotations
            torch.nn.init.uniform_(parameter, 0.2, 2.0)
    directory.mkdir()
    model.save_pretrained(directory, safe_serialization=True)
    return model
