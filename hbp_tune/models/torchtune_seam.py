"""The private names of torchtune that hbp-tune leans on, each with a probe; torchtune is no longer maintained."""

from collections.abc import Callable, Mapping

from torch import Tensor
from torchtune.models.llama3._tokenizer import CL100K_PATTERN as CL100K_PATTERN
from torchtune.models.qwen2 import _convert_weights
from torchtune.modules import MultiHeadAttention

from hbp_tune.errors import ConfigError

TESTED_VERSIONS = ("0.6.1",)

# (q, k, v) as [batch, heads, tokens, head_dim], with torchtune's mask, dropout_p and is_causal as keywords.
AttentionCall = Callable[..., Tensor]


def replace_attention_call(attention: MultiHeadAttention, call: AttentionCall) -> None:
    """Let an attention module call ``call`` in place of SDPA or flex attention.

    Raises:
        ConfigError: this torchtune has no such hook.
    """
    if not callable(getattr(attention, "_attention_call", None)):
        raise ConfigError(
            f"this torchtune's MultiHeadAttention has no _attention_call to replace; install one of {', '.join(TESTED_VERSIONS)}"
        )
    attention._attention_call = call
    # torchtune copies keys and values up to the query heads before the call. A module whose KV heads "equal" its query
    # heads skips the copy, bit for bit the same otherwise; the projections keep their own sizes.
    attention.num_kv_heads = attention.num_heads


def know_weights(names: Mapping[str, str]) -> None:
    """Let torchtune's conversion of Qwen2's checkpoints know more weights, in both directions.

    Args:
        names: in Hugging Face's files, ``{}`` for the layer, to torchtune's.

    Raises:
        ConfigError: this torchtune has no such table.
    """
    known = getattr(_convert_weights, "_FROM_HF", None)
    if not isinstance(known, dict):
        raise ConfigError(
            f"this torchtune's conversion of Qwen2's weights has no table to add to; install one of {', '.join(TESTED_VERSIONS)}"
        )
    known.update(names)
