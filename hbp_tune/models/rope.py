"""Positions beyond those a model was trained on: YaRN (Peng et al. 2023, arXiv 2309.00071) for Qwen2 and Qwen2.5."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import TransformerDecoder

from hbp_tune.errors import ConfigError

# The paper's choice for Llama, and transformers' defaults.
BETA_FAST, BETA_SLOW = 32.0, 1.0


def default_attention_factor(factor: float) -> float:
    """Give the paper's factor of cos and sin for a stretch by ``factor``; transformers' default too."""
    return 0.1 * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Yarn:
    """How far positions are stretched, and which frequencies take part.

    Args:
        factor: positions afterwards over positions before.
        original_max_position_embeddings: positions that the model was trained on.
        beta_fast: dimensions that turn at least as often as this over the original positions stay as they are.
        beta_slow: dimensions that turn at most as often as this are stretched by the whole factor.
        attention_factor: of queries and keys, by way of cos and sin; None is the paper's ``0.1 * ln(factor) + 1``.

    Raises:
        ConfigError: a value that stretches nothing, or has no meaning.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = BETA_FAST
    beta_slow: float = BETA_SLOW
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.factor <= 1:
            raise ConfigError(
                f"YaRN factor={self.factor} must be above 1, which stretches nothing; raise it, or leave with_yarn out"
            )
        if self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"YaRN original_max_position_embeddings={self.original_max_position_embeddings} must be at least 1: "
                f"the positions that the model was trained on"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise ConfigError(
                f"YaRN beta_slow={self.beta_slow} must be above 0 and below beta_fast={self.beta_fast}; "
                f"leave both out for {BETA_SLOW:g} and {BETA_FAST:g}"
            )
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise ConfigError(
                f"YaRN attention_factor={self.attention_factor} must be above 0; leave it out for 0.1 * ln(factor) + 1"
            )

    @property
    def max_seq_len(self) -> int:
        """Positions that can be encoded."""
        return int(self.factor * self.original_max_position_embeddings)

    @property
    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by."""
        return default_attention_factor(self.factor) if self.attention_factor is None else self.attention_factor

    def inverse_frequencies(self, dim: int, base: float) -> Tensor:
        """Give the angles between neighbouring positions on the default device, ``float32[dim // 2]``.

        Step by step as transformers' ``_compute_yarn_parameters``: at 100,000 positions an angle that differs in its last
        bit is another angle.
        """
        frequencies = base ** (torch.arange(0, dim, 2).float() / dim)
        low = max(math.floor(self._dim_that_turns(self.beta_fast, dim, base)), 0)
        high = min(math.ceil(self._dim_that_turns(self.beta_slow, dim, base)), dim - 1)
        # The paper's ramp from low to high; the 0.001, transformers' own, is where both are the same.
        ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001), 0, 1)
        kept = 1 - ramp
        return 1.0 / (self.factor * frequencies) * (1 - kept) + 1.0 / frequencies * kept

    def _dim_that_turns(self, times: float, dim: int, base: float) -> float:
        turned = self.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(turned) / (2 * math.log(base))

    def hf_rope_scaling(self) -> dict[str, Any]:
        """Say the same as ``rope_scaling`` in Hugging Face's config.json does; its defaults are left out."""
        scaling: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": float(self.factor),
            "original_max_position_embeddings": self.original_max_position_embeddings,
        }
        if (self.beta_fast, self.beta_slow) != (BETA_FAST, BETA_SLOW):
            scaling |= {"beta_fast": float(self.beta_fast), "beta_slow": float(self.beta_slow)}
        if self.attention_factor is not None:
            scaling["attention_factor"] = float(self.attention_factor)
        return scaling


class YarnRotaryPositionalEmbeddings(Qwen2RotaryPositionalEmbeddings):
    """Qwen2's rotary embedding, stretched.

    Args:
        dim: features per head.
        base: of the geometric row of frequencies; ``rope_theta`` in config.json.
        yarn: how far, and which frequencies.
    """

    def __init__(self, dim: int, base: float, yarn: Yarn) -> None:
        self.yarn = yarn  # first, since torchtune's __init__ calls rope_init
        super().__init__(dim=dim, max_seq_len=yarn.max_seq_len, base=base)

    def rope_init(self) -> None:
        """Compute the angles of all positions on the default device; on the meta device this only gives shapes."""
        self.register_buffer("theta", self.yarn.inverse_frequencies(self.dim, self.base), persistent=False)
        self.build_rope_cache(self.max_seq_len)

    def build_rope_cache(self, max_seq_len: int = 4096) -> None:
        """Fill ``cache``, ``float32[max_seq_len, 2 * dim]``: cos, then sin."""
        super().build_rope_cache(max_seq_len)
        self.cache *= self.yarn.cos_sin_factor


def with_yarn(
    model: TransformerDecoder,
    factor: float,
    original_max_position_embeddings: int | None = None,
    beta_fast: float = BETA_FAST,
    beta_slow: float = BETA_SLOW,
    attention_factor: float | None = None,
) -> TransformerDecoder:
    """Let a Qwen2 or Qwen2.5 decoder encode ``factor`` times its positions, in place.

    Weights and their names stay as they are: rotary embeddings have none. The defaults are transformers'.

    Args:
        model: on any device, the meta device included.
        factor: see `Yarn`, as for the other arguments.
        original_max_position_embeddings: by default the model's own ``max_seq_len``.

    Returns:
        The same model.

    Raises:
        ConfigError: the model's rotary embedding is not Qwen2's, or a value has no meaning.
    """
    attentions = [layer.attn for layer in model.layers]
    for attention in attentions:
        if type(attention.pos_embeddings) is not Qwen2RotaryPositionalEmbeddings:
            raise ConfigError(
                f"with_yarn stretches Qwen2RotaryPositionalEmbeddings (qwen2, qwen2_5), the model has "
                f"{type(attention.pos_embeddings).__name__}; leave with_yarn out"
            )
    if original_max_position_embeddings is None:
        original_max_position_embeddings = model.max_seq_len
    yarn = Yarn(
        factor=factor,
        original_max_position_embeddings=original_max_position_embeddings,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        attention_factor=attention_factor,
    )
    plain = attentions[0].pos_embeddings
    with plain.theta.device:
        rope = YarnRotaryPositionalEmbeddings(plain.dim, plain.base, yarn)
    for attention in attentions:
        attention.pos_embeddings = rope  # one for all layers, as before: its table has a row for every position
        attention.max_seq_len = rope.max_seq_len
    model.max_seq_len = rope.max_seq_len
    return model
