"""Shapes of well-known models, and of a checkpoint's config.json: what planning needs of a model, without torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbp_tune.errors import ConfigError
from hbp_tune.planning.costs.cost import ModelShape
from hbp_tune.planning.costs.exchange import AttentionHeads
from hbp_tune.planning.costs.memory import DecoderShape


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownModel:
    """A dense decoder, by its numbers.

    Args:
        decoder: what decides its memory.
        has_bias: queries, keys and values have one, as in Qwen2.
        has_qk_norm: queries and keys are normalised, as in Qwen3.
    """

    decoder: DecoderShape
    has_bias: bool = False
    has_qk_norm: bool = False

    @property
    def shape(self) -> ModelShape:
        """What decides its cost: as `model_shape` measures it of the built model."""
        decoder = self.decoder
        biases = self.has_bias * decoder.head_dim * (decoder.num_heads + 2 * decoder.num_kv_heads)
        norms = self.has_qk_norm * 2 * decoder.head_dim
        num_params = decoder.num_params + decoder.num_layers * (biases + norms)
        return ModelShape(
            num_layers=decoder.num_layers,
            linear_params=num_params if decoder.tied else num_params - decoder.vocab_params,
            attention_dim=decoder.num_heads * decoder.head_dim,
            heads=AttentionHeads(query=decoder.num_heads, kv=decoder.num_kv_heads),
            head_params=decoder.vocab_params,
            gathered_params=num_params,
        )


def _llama(num_layers: int, embed_dim: int, num_heads: int, head_dim: int, intermediate_dim: int) -> KnownModel:
    decoder = DecoderShape(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=head_dim,
        intermediate_dim=intermediate_dim,
        vocab_size=128256,
        tied=embed_dim < 4096,
    )
    return KnownModel(decoder=decoder)


def _qwen2_5(num_layers: int, embed_dim: int, num_heads: int, num_kv_heads: int, intermediate_dim: int) -> KnownModel:
    is_small = embed_dim <= 2048
    decoder = DecoderShape(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=embed_dim // num_heads,
        intermediate_dim=intermediate_dim,
        vocab_size=151936 if is_small else 152064,
        tied=is_small,
    )
    return KnownModel(decoder=decoder, has_bias=True)


def _qwen3(num_layers: int, embed_dim: int, num_heads: int, intermediate_dim: int) -> KnownModel:
    decoder = DecoderShape(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_dim=intermediate_dim,
        vocab_size=151936,
        tied=embed_dim < 4096,
    )
    return KnownModel(decoder=decoder, has_qk_norm=True)


# By the names of their builders in torchtune and here.
MODELS = {
    "llama3_1_8b": _llama(32, 4096, 32, 128, 14336),
    "llama3_1_70b": _llama(80, 8192, 64, 128, 28672),
    "llama3_2_1b": _llama(16, 2048, 32, 64, 8192),
    "llama3_2_3b": _llama(28, 3072, 24, 128, 8192),
    "llama3_3_70b": _llama(80, 8192, 64, 128, 28672),
    "qwen2_5_0_5b": _qwen2_5(24, 896, 14, 2, 4864),
    "qwen2_5_1_5b": _qwen2_5(28, 1536, 12, 2, 8960),
    "qwen2_5_3b": _qwen2_5(36, 2048, 16, 2, 11008),
    "qwen2_5_7b": _qwen2_5(28, 3584, 28, 4, 18944),
    "qwen2_5_14b": _qwen2_5(48, 5120, 40, 8, 13824),
    "qwen2_5_32b": _qwen2_5(64, 5120, 40, 8, 27648),
    "qwen2_5_72b": _qwen2_5(80, 8192, 64, 8, 29568),
    "qwen3_0_6b": _qwen3(28, 1024, 16, 3072),
    "qwen3_1_7b": _qwen3(28, 2048, 16, 6144),
    "qwen3_4b": _qwen3(36, 2560, 32, 9728),
    "qwen3_8b": _qwen3(36, 4096, 32, 12288),
    "qwen3_14b": _qwen3(40, 5120, 40, 17408),
    "qwen3_32b": _qwen3(64, 5120, 64, 25600),
}
# Of config.json; other families may have layers that these numbers do not describe.
_DENSE = ("llama", "mistral", "qwen2", "qwen3")


def known_model(name: str) -> KnownModel:
    """Give a model by its name, or by the folder of its checkpoint.

    Args:
        name: of `MODELS`, or a path of a folder with a config.json, or of that file.

    Raises:
        ConfigError: it is neither, or the checkpoint is of no dense family.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ConfigError(
            f"model={name!r} is neither known nor a checkpoint's folder with a config.json; known are {', '.join(MODELS)}"
        )
    try:
        return _of_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} describes no dense decoder: {type(error).__name__}: {error}") from error


def _of_config(values: dict[str, Any]) -> KnownModel:
    family = values["model_type"]
    if family not in _DENSE:
        raise ValueError(f"model_type={family!r} is none of {', '.join(_DENSE)}")
    num_heads = values["num_attention_heads"]
    decoder = DecoderShape(
        num_layers=values["num_hidden_layers"],
        embed_dim=values["hidden_size"],
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads") or num_heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // num_heads,
        intermediate_dim=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        tied=values.get("tie_word_embeddings", False),
    )
    return KnownModel(decoder=decoder, has_bias=family == "qwen2", has_qk_norm=family == "qwen3")
