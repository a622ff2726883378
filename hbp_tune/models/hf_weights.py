"""Names and layouts of weights: ours, which are torchtune's, beside those of Hugging Face's files; one table per family."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hbp_tune.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight in Hugging Face's files.

    Args:
        name: there, ``{}`` for the layer.
        is_rotary: its rows are the halves of each head's rotary pairs, where ours are the pairs one after the other.
    """

    name: str
    is_rotary: bool = False


_BLOCK = "model.layers.{}."
_COMMON = {
    "tok_embeddings.weight": Weight("model.embed_tokens.weight"),
    "norm.scale": Weight("model.norm.weight"),
    "output.weight": Weight("lm_head.weight"),
    "layers.{}.attn.v_proj.weight": Weight(_BLOCK + "self_attn.v_proj.weight"),
    "layers.{}.attn.output_proj.weight": Weight(_BLOCK + "self_attn.o_proj.weight"),
    "layers.{}.mlp.w1.weight": Weight(_BLOCK + "mlp.gate_proj.weight"),
    "layers.{}.mlp.w2.weight": Weight(_BLOCK + "mlp.down_proj.weight"),
    "layers.{}.mlp.w3.weight": Weight(_BLOCK + "mlp.up_proj.weight"),
    "layers.{}.sa_norm.scale": Weight(_BLOCK + "input_layernorm.weight"),
    "layers.{}.mlp_norm.scale": Weight(_BLOCK + "post_attention_layernorm.weight"),
}
_HALVES = {f"layers.{{}}.attn.{x}_proj.weight": Weight(f"{_BLOCK}self_attn.{x}_proj.weight") for x in "qk"}
_PAIRS = {name: Weight(weight.name, is_rotary=True) for name, weight in _HALVES.items()}
_BIASES = {f"layers.{{}}.attn.{x}_proj.bias": Weight(f"{_BLOCK}self_attn.{x}_proj.bias") for x in "qkv"}
_HEAD_NORMS = {f"layers.{{}}.attn.{x}_proj.norm.scale": Weight(f"{_BLOCK}self_attn.{x}_norm.weight") for x in "qk"}
# By ``model_type`` of config.json. torchtune rotates neighbours in Llama's models, and halves in Qwen's as Hugging Face does.
FAMILIES: Mapping[str, Mapping[str, Weight]] = {
    "llama": _COMMON | _PAIRS,
    "mistral": _COMMON | _PAIRS,
    "qwen2": _COMMON | _HALVES | _BIASES,
    "qwen3": _COMMON | _HALVES | _HEAD_NORMS,
}
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def hf_weights(names: Iterable[str], family: str) -> dict[str, Weight]:
    """Give the weight in Hugging Face's files for each of our names.

    Raises:
        ConfigError: a name is not in the family's table, so that the model is of another family.
    """
    table = FAMILIES[family]
    found = {}
    for name in names:
        layer = _LAYER.search(name)
        weight = table.get(_LAYER.sub("{}", name))
        if weight is None:
            raise ConfigError(
                f"the model has a weight {name}, which checkpoints of model_type={family} do not have; take the builder of the "
                f"checkpoint's family as model"
            )
        found[name] = Weight(weight.name.format(layer[0]) if layer else weight.name, weight.is_rotary)
    return found


def pairs_of_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Bring the rows of each head from Hugging Face's order to ours; ``[heads * head_dim, ...]``."""
    paired: Tensor = weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return paired
