"""Adapts any torchtune decoder of plain self-attention layers: attention inside packs, and the loss inside the forward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torchtune.modules import MultiHeadAttention, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.tied_linear import TiedLinear

from hbp_tune.errors import ConfigError
from hbp_tune.models.torchtune_seam import replace_attention_call
from hbp_tune.parallel.compile import between_graphs
from hbp_tune.parallel.loss_head import ForwardGradientHead, LossHead
from hbp_tune.parallel.parallelize import PackContext
from hbp_tune.planning.costs.cost import ModelShape
from hbp_tune.planning.costs.exchange import AttentionHeads
from hbp_tune.planning.costs.memory import DecoderShape


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderParts:
    """What the parallel techniques need to know of a decoder.

    Args:
        layers: in order; recomputed and sharded one by one.
        heads: of each attention layer.
        max_seq_len: positions that the model can encode: the longest document.
    """

    layers: tuple[nn.Module, ...]
    heads: AttentionHeads
    max_seq_len: int


def adapt_decoder(model: nn.Module, *, loss_head: LossHead | None = None) -> DecoderParts:
    """Hook packs into a torchtune decoder, in place: its forward takes a `PackContext` as mask and returns the loss.

    Parameters and their names stay as they are, so that torchtune's checkpointers work on. Call it before FSDP.

    Args:
        model: the decoder.
        loss_head: turns the last hidden states into the loss; `ForwardGradientHead` where left out.

    Raises:
        ConfigError: the model is not a decoder of plain self-attention layers, or has dropout in its attention.
    """
    if type(model) is not TransformerDecoder:
        raise ConfigError(
            f"model {type(model).__name__} is not supported: hbp-tune trains torchtune.modules.TransformerDecoder "
            f"(the text models llama2 to llama3_3, qwen2, qwen2_5, mistral, phi3 ...)"
        )
    decoder = cast(Any, model)  # torch's modules do not say what their attributes are
    for index, layer in enumerate(decoder.layers):
        attention: Any = getattr(layer, "attn", None)
        if not isinstance(layer, TransformerSelfAttentionLayer) or type(attention) is not MultiHeadAttention:
            raise ConfigError(
                f"layer {index} of the model is a {type(layer).__name__} with {type(attention).__name__}; only "
                f"TransformerSelfAttentionLayer with MultiHeadAttention can attend inside packs"
            )
        if attention.attn_dropout > 0:
            raise ConfigError(f"model.attn_dropout={attention.attn_dropout} must be 0: packed attention has no dropout")
    attention = decoder.layers[0].attn
    parts = DecoderParts(
        layers=tuple(decoder.layers),
        heads=AttentionHeads(query=attention.num_heads, kv=attention.num_kv_heads),
        max_seq_len=decoder.max_seq_len,
    )
    for layer in decoder.layers:
        replace_attention_call(layer.attn, _attend_inside_pack)
    if not isinstance(decoder.output, TiedLinear):
        decoder.output.__class__ = LossLinear
    decoder.__class__ = LossDecoder
    decoder.loss_head = loss_head or ForwardGradientHead()
    return parts


def model_shape(model: nn.Module) -> ModelShape:
    """Measure what decides a decoder's cost, before or after `adapt_decoder`; weights on the meta device are enough.

    An input embedding is only looked up, so its weights count where the output projection multiplies by them: when tied.
    """
    decoder = cast(Any, model)
    attention = decoder.layers[0].attn
    kv_heads = attention.k_proj.out_features // attention.head_dim  # `adapt_decoder` changes num_kv_heads
    all_params = sum(parameter.numel() for parameter in decoder.parameters())  # a shared one once
    embedding = sum(parameter.numel() for parameter in decoder.tok_embeddings.parameters())
    return ModelShape(
        num_layers=len(decoder.layers),
        linear_params=all_params if isinstance(decoder.output, TiedLinear) else all_params - embedding,
        attention_dim=attention.num_heads * attention.head_dim,
        heads=AttentionHeads(query=attention.num_heads, kv=kv_heads),
        head_params=embedding,  # the output projection has the embedding's shape
        gathered_params=all_params,
    )


def decoder_shape(model: nn.Module) -> DecoderShape:
    """Measure what decides a decoder's memory, before or after `adapt_decoder`; weights on the meta device are enough.

    Raises:
        ConfigError: its layers have no gated feed-forward (``w1``, ``w2``, ``w3``), whose activations the memory model counts.
    """
    decoder = cast(Any, model)
    layer = decoder.layers[0]
    if getattr(layer.mlp, "w3", None) is None:
        raise ConfigError(
            f"the memory of a {type(layer.mlp).__name__} is not modelled, only that of gated feed-forwards (w1, w2, w3); "
            f"give the groups yourself"
        )
    return DecoderShape(
        num_layers=len(decoder.layers),
        embed_dim=layer.attn.q_proj.in_features,
        num_heads=layer.attn.num_heads,
        num_kv_heads=layer.attn.k_proj.out_features // layer.attn.head_dim,
        head_dim=layer.attn.head_dim,
        intermediate_dim=layer.mlp.w1.out_features,
        vocab_size=decoder.tok_embeddings.num_embeddings,
        tied=isinstance(decoder.output, TiedLinear),
    )


def separate_units(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Give the modules that torchtune's ``custom_sharded_layers`` asks to shard by themselves.

    The weight of a tied embedding stays with the model: the loss head reads it outside the embedding's own forward.

    Raises:
        ConfigError: there is no module of that name.
    """
    units = []
    for name in names:
        if isinstance(model.output, TiedLinear) and name in ("tok_embeddings", "output"):
            continue
        try:
            units.append(model.get_submodule(name))
        except AttributeError as error:
            possible = ", ".join(child for child, _ in model.named_children())
            raise ConfigError(f"custom_sharded_layers: the model has no {name!r}; it has {possible}") from error
    return units


@between_graphs(token_dim=2)
def _attend_inside_pack(q: Tensor, k: Tensor, v: Tensor, *, mask: PackContext, **_: Any) -> Tensor:
    # torchtune's [1, heads, local_len, head_dim] to and from the kernels' [local_len, heads, head_dim]
    attended = mask.attend(*(x[0].transpose(0, 1) for x in (q, k, v)))
    # Contiguous from every kernel and scheme, so that no graph is compiled for each; torchtune would copy it next anyway.
    return attended.contiguous().transpose(0, 1)[None]


class LossLinear(nn.Linear):
    """The output projection as a loss head; a module, so that FSDP can shard it by itself."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, loss_head: LossHead, labels: Tensor, loss_weights: Tensor
    ) -> Tensor:
        """Give the weighted sum of token losses; arguments as in `LossHead`."""
        return loss_head(hidden, self.weight, labels, loss_weights)


class LossDecoder(TransformerDecoder):
    """A torchtune decoder whose forward ends in the loss, so that all logits are never held at once."""

    loss_head: LossHead  # set by `adapt_decoder`

    def forward(  # type: ignore[override]
        self, tokens: Tensor, *, mask: PackContext, input_pos: Tensor, labels: Tensor, loss_weights: Tensor
    ) -> Tensor:
        """Give the weighted sum of this shard's token losses, a scalar in fp32.

        Args:
            tokens: ``int64[1, local_len]``.
            mask: the pack that the rows belong to, from `GroupSwitch.activate`.
            input_pos: ``int64[1, local_len]``, positions inside each document.
            labels: ``int64[1, local_len]``, -100 where a token does not count.
            loss_weights: ``float32[1, local_len]``.
        """
        hidden = self.tok_embeddings(tokens)
        for layer in self.layers:
            hidden = layer(hidden, mask=mask, input_pos=input_pos)
        hidden = self.norm(hidden)
        if isinstance(self.output, TiedLinear):
            return self.loss_head(hidden, self.output.tied_module.weight, labels, loss_weights)
        return cast(Tensor, self.output(hidden, self.loss_head, labels, loss_weights))
