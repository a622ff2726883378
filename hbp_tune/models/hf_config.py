"""What Hugging Face's config.json says of positions, beside the model that is trained: rotary embeddings are not weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.phi3 import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RotaryPositionalEmbeddings

from hbp_tune.errors import ConfigError
from hbp_tune.models.rope import BETA_FAST, BETA_SLOW, YarnRotaryPositionalEmbeddings, default_attention_factor

_PLAIN = (RotaryPositionalEmbeddings, Qwen2RotaryPositionalEmbeddings, Phi3RotaryPositionalEmbeddings)
# What transformers takes where config.json has no rope_theta, as those of Llama 2 have none.
_DEFAULT_THETA = 10_000.0
# Keys that newer files keep beside the scaling, and that say nothing of it.
_BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """How a model encodes positions, in the words of config.json.

    Args:
        rope_theta: torchtune's ``rope_base``.
        rope_scaling: with ``rope_type`` and its values; None is plain RoPE.
        max_position_embeddings: the longest document that the model is built for.
    """

    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int


def model_positions(model: nn.Module) -> Positions | None:
    """Find out how a torchtune decoder encodes positions, before or after `adapt_decoder`; None is a way unknown here."""
    rope = _rotary_embedding(model)
    scaling: dict[str, Any] | None = None
    if isinstance(rope, YarnRotaryPositionalEmbeddings):
        scaling = rope.yarn.hf_rope_scaling()
    elif isinstance(rope, Llama3ScaledRoPE):
        scaling = {
            "rope_type": "llama3",
            "factor": float(rope.scale_factor),
            "low_freq_factor": float(rope.low_freq_factor),
            "high_freq_factor": float(rope.high_freq_factor),
            "original_max_position_embeddings": rope.old_context_len,
        }
    elif type(rope) not in _PLAIN:
        return None
    return Positions(rope_theta=float(rope.base), rope_scaling=scaling, max_position_embeddings=cast(Any, model).max_seq_len)


def _rotary_embedding(model: nn.Module) -> Any:
    return cast(Any, model).layers[0].attn.pos_embeddings


def config_of_positions(config: dict[str, Any], positions: Positions) -> dict[str, Any]:
    """Give a config.json that is true of the model that is trained.

    What says the same already stays as it is, in older words (``type``) and newer ones (``rope_parameters``), and so do all
    other keys and their order. ``max_position_embeddings`` is never lowered.

    Args:
        config: the checkpoint's.
        positions: of the model.

    Raises:
        ConfigError: another rope_theta, with which the checkpoint's weights make no sense.
    """
    # transformers reads rope_parameters, the newer key, only where rope_scaling has nothing to say.
    key = "rope_parameters" if config.get("rope_parameters") and not config.get("rope_scaling") else "rope_scaling"
    said = config.get(key) or {}
    theta = said.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA
    if theta != positions.rope_theta:
        raise ConfigError(
            f"the checkpoint was trained with rope_theta={theta} (config.json), the model is built with "
            f"{positions.rope_theta}; take this checkpoint's own builder as model, or a general one with rope_base: {theta}"
        )
    longest = max(config.get("max_position_embeddings") or 0, positions.max_position_embeddings)
    true = {**config, "max_position_embeddings": longest}
    if _meaning(said, longest) != _meaning(positions.rope_scaling or {}, longest):
        beside = {name: said[name] for name in _BESIDE_SCALING if name in said}
        true[key] = beside | (positions.rope_scaling or ({"rope_type": "default"} if beside else {})) or None
    return true


def _meaning(scaling: dict[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """Spell out what transformers understands, so that equal scalings are equal however they are written."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {}
    values: dict[str, Any] = {"original_max_position_embeddings": max_position_embeddings}
    if kind == "yarn":
        values |= {"beta_fast": BETA_FAST, "beta_slow": BETA_SLOW, "truncate": True}
        values["attention_factor"] = default_attention_factor(scaling.get("factor") or 1)
    names = scaling.keys() - {"rope_type", "type", *_BESIDE_SCALING}
    return values | {name: scaling[name] for name in names if scaling[name] is not None} | {"rope_type": kind}


class HFConfig:
    """The config.json of a Hugging Face checkpoint, and of what a run exports.

    Args:
        checkpoint_dir: the checkpoint's folder, whose config.json torchtune's checkpointer copies into each export.
        model: the decoder that is trained.

    Raises:
        ConfigError: the model is built for another rope_theta than the checkpoint's.
    """

    def __init__(self, checkpoint_dir: Path, model: nn.Module) -> None:
        self._source = checkpoint_dir / "config.json"
        self._text = self._source.read_text(encoding="utf-8")
        self._config: dict[str, Any] = json.loads(self._text)
        self._rope = type(_rotary_embedding(model)).__name__
        self._positions = model_positions(model)
        self._true = config_of_positions(self._config, self._positions) if self._positions else self._config
        if self._true != self._config:
            self._text = json.dumps(self._true, indent=2, ensure_ascii=False) + "\n"

    def differences(self) -> list[str]:
        """Say in one line each what the checkpoint's file says of positions and is not so in the model."""
        if self._positions is None:
            return [f"{self._source} is exported as it is: what it says of positions is not compared with {self._rope}"]
        return [
            f"{self._source}: {key} is {json.dumps(self._config.get(key))}, the model is built with {json.dumps(value)}: it is "
            f"trained so, and the exported config.json will say so; if the checkpoint's is meant, change model"
            for key, value in self._true.items()
            if value != self._config.get(key)
        ]

    def write(self, folder: Path) -> None:
        """Let the config.json of an export be true; where nothing differs it is the checkpoint's own."""
        path = folder / "config.json"
        # torchtune's checkpointer keeps a file that is there already, such as an earlier run's.
        if path.is_file() and path.read_text(encoding="utf-8") == self._text:
            return
        unfinished = path.with_suffix(".json.tmp")
        unfinished.write_text(self._text, encoding="utf-8")
        unfinished.replace(path)  # at once, so that no reader finds half a file
