"""A small random checkpoint in the shape of Llama 3 and in Hugging Face's format."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

from hbp_tune.demo import DemoError
from hbp_tune.demo.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, special_token_ids

INIT_STD = 0.02
NORM_EPS = 1e-5
ROPE_BASE = 500_000
# What torchtune's Llama 3.1 RoPE has built in; config.json must say the same.
ROPE_LOW_FREQ_FACTOR = 1.0
ROPE_HIGH_FREQ_FACTOR = 4.0
ROPE_ORIGINAL_POSITIONS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyLlama:
    """The shape of a Llama 3 model; the default is the demo's.

    Attributes:
        vocab_size: tokens, the special ones included: they are the last ones.
        num_heads: query heads.
        num_kv_heads: key and value heads, each shared by ``num_heads // num_kv_heads`` query heads.
        tied: one matrix for the input and the output embedding, as in Llama 3.2; Llama 3.1 has two.
        rope_factor: how far Llama 3's RoPE scaling stretches the low frequencies.
    """

    vocab_size: int = VOCAB_SIZE
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    embed_dim: int = 128
    intermediate_dim: int = 384
    max_position_embeddings: int = 32768
    tied: bool = False
    rope_factor: float = 8.0

    def __post_init__(self) -> None:
        if self.embed_dim % (2 * self.num_heads):
            raise DemoError(
                f"embed_dim={self.embed_dim} must be a multiple of 2 * num_heads={2 * self.num_heads}: RoPE turns pairs; "
                "round it up or lower num_heads"
            )
        if self.num_heads % self.num_kv_heads:
            raise DemoError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.vocab_size <= len(SPECIAL_TOKENS):
            raise DemoError(f"vocab_size={self.vocab_size} must be above {len(SPECIAL_TOKENS)}, the special tokens")

    @property
    def head_dim(self) -> int:
        """Features per head."""
        return self.embed_dim // self.num_heads


def build(shape: TinyLlama) -> TransformerDecoder:
    """Build the decoder with torchtune's own builder, on the current default device."""
    builder = llama3_2 if shape.tied else llama3_1
    return builder(
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        embed_dim=shape.embed_dim,
        max_seq_len=shape.max_position_embeddings,
        rope_base=ROPE_BASE,
        intermediate_dim=shape.intermediate_dim,
        norm_eps=NORM_EPS,
        scale_factor=shape.rope_factor,
    )


def random_state_dict(shape: TinyLlama, seed: int) -> dict[str, Tensor]:
    """Float32 weights under torchtune's names: norms are one, all else normal with ``INIT_STD``.

    The global generator is left alone: the decoder is built on the meta device, which draws nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        empty = build(shape).state_dict()
    # Norms are the only one-dimensional weights: no layer has a bias.
    return {
        name: torch.ones(weight.shape) if weight.ndim == 1 else torch.randn(weight.shape, generator=generator) * INIT_STD
        for name, weight in empty.items()
    }


def hf_config(shape: TinyLlama) -> dict[str, Any]:
    """The fields of ``config.json`` that transformers and torchtune's checkpointer read."""
    ids = special_token_ids(shape.vocab_size)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.embed_dim,
        "intermediate_size": shape.intermediate_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": float(ROPE_BASE),
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": shape.rope_factor,
            "low_freq_factor": ROPE_LOW_FREQ_FACTOR,
            "high_freq_factor": ROPE_HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": ROPE_ORIGINAL_POSITIONS,
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": ids["<|end_of_text|>"],
        "pad_token_id": ids["<|finetune_right_pad_id|>"],
        "torch_dtype": "float32",
        "use_cache": True,
    }


def write_checkpoint(directory: Path, shape: TinyLlama, seed: int) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``model.safetensors``; the same bytes for the same seed."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = tune_to_hf(
        random_state_dict(shape, seed),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        dim=shape.embed_dim,
        head_dim=shape.head_dim,
    )
    save_file({name: weight.contiguous() for name, weight in weights.items()}, directory / "model.safetensors", {"format": "pt"})
    ids = special_token_ids(shape.vocab_size)
    generation = {
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]],
        "pad_token_id": ids["<|finetune_right_pad_id|>"],
    }
    for name, fields in (("config.json", hf_config(shape)), ("generation_config.json", generation)):
        (directory / name).write_bytes((json.dumps(fields, indent=2) + "\n").encode())
