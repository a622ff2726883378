"""What a training step holds on one GPU: modelled bytes, part by part, from the model's shape and the group's settings.

Counted, not fitted: what autograd saves in torchtune's layer run op by op (compiled layers save less), what FSDP2 gathers,
and what is alive at the moments when most of it is. Only the reserve for what no tensor accounts for is an allowance.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hbp_tune.errors import ConfigError
from hbp_tune.planning.costs.exchange import AttentionHeads, kept_heads
from hbp_tune.planning.plans.records import PackingGroup, check_ac_layers, check_groups
from hbp_tune.planning.plans.sharding import CpDegrees, share_out

GIB = 2**30
_BF16, _FP32 = 2, 4
# CUDA's context and kernels (about half a GiB), cuBLAS's workspace, NCCL's buffers of a few communicators, and what the
# caching allocator cannot reuse. No tensor accounts for it: an allowance, the one figure here that is not counted.
RESERVE_BYTES = 2 * GIB
# Of a card's memory, what a step may take by count, where no one says otherwise: counted peaks were within 4% of measured ones,
# and a card has less than its name says (79.6 of 80 GiB).
SAFE_SHARE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """What decides the memory of a decoder with grouped-query attention, RMSNorm, RoPE and SwiGLU.

    Args:
        num_layers: transformer layers.
        embed_dim: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: of one head.
        intermediate_dim: width between the feed-forward projections.
        vocab_size: rows of the embedding.
        tied: the output projection is the embedding.

    Raises:
        ConfigError: a value is below 1.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_dim: int
    vocab_size: int
    tied: bool = False

    def __post_init__(self) -> None:
        for field in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "intermediate_dim", "vocab_size"):
            if getattr(self, field) < 1:
                raise ConfigError(f"decoder shape: {field}={getattr(self, field)} must be at least 1")

    @property
    def layer_params(self) -> int:
        """Weights of one layer; biases, where a model has some, are left out."""
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.embed_dim * self.intermediate_dim + 2 * self.embed_dim

    @property
    def vocab_params(self) -> int:
        """Weights of the embedding; of the output projection as many."""
        return self.vocab_size * self.embed_dim

    @property
    def num_params(self) -> int:
        """All weights."""
        return self.num_layers * self.layer_params + (1 if self.tied else 2) * self.vocab_params + self.embed_dim


LLAMA3_1_8B_DECODER = DecoderShape(
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_dim=14336,
    vocab_size=128256,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """Bytes per weight of what a rank keeps a shard of; gradients are reduced and kept in the weights' type.

    Args:
        weight: 2 in bf16, 4 where fp32 weights are gathered in bf16 (``compute_dtype``).
        optimizer: its states.
    """

    weight: int
    optimizer: float


BF16_ADAMW = StateBytes(weight=2, optimizer=4)
FP32_ADAMW = StateBytes(weight=4, optimizer=8)
# Two states of a byte, with an fp32 scale for every 256 values (the block of torchao and of bitsandbytes).
BF16_ADAMW_8BIT = StateBytes(weight=2, optimizer=2 * (1 + 4 / 256))


def adamw_bytes(*, weight: int, is_8bit: bool = False) -> StateBytes:
    """Give the states of AdamW: two in the weights' type, or in 8 bits."""
    return StateBytes(weight=weight, optimizer=BF16_ADAMW_8BIT.optimizer if is_8bit else 2 * weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerActivations:
    """Bytes of one layer's activations in bf16, per token that a rank holds.

    Args:
        attention: saved for the backward by the first norm, the projections, RoPE and the attention kernel.
        mlp: saved by the second norm and the feed-forward.
        recomputed: kept on the device by a layer that recomputes, in place of these two.
        attention_work: beyond what is saved, at the fullest moment of attention's backward.
        mlp_work: beyond what is saved, at the fullest moment of the feed-forward's backward.
        exchange: of ``attention_work``, what context parallelism sends and receives.
    """

    attention: float
    mlp: float
    recomputed: float
    attention_work: float
    mlp_work: float
    exchange: float


def layer_activations(shape: DecoderShape, group: PackingGroup, layout: CpDegrees | None = None) -> LayerActivations:
    """Count a layer's activations for a pack that is one document.

    Args:
        shape: of the decoder.
        group: its CP degree and ``ac_mode`` count.
        layout: how the ranks divide attention; Ulysses where left out.
    """
    layout = layout or CpDegrees(ulysses=group.cp_degree)
    heads = AttentionHeads(query=shape.num_heads, kv=shape.num_kv_heads)
    sent = heads.over(layout.ulysses)
    padded = 2 * group.cp_degree * group.cp_degree  # the runs of one document scale, so any length gives the same per token
    key_rows = max(int(part.key_lens.sum()) for part in share_out([padded], padded, layout.gather))
    qkv = _BF16 * shape.head_dim * kept_heads(heads, layout, padded, key_rows) * group.cp_degree / padded
    out = (_BF16 * shape.head_dim + _FP32) * sent.query  # and the logarithm of the softmax's sum
    returned = _BF16 * shape.head_dim * shape.num_heads if layout.ulysses > 1 else 0  # else the kernel's own output goes on
    residual = _BF16 * shape.embed_dim
    norm = _norm_bytes(shape) + residual  # and its output
    rope = 2 * _FP32 * shape.head_dim  # sines and cosines that queries and keys are multiplied by
    # What selective recomputation keeps besides the input: what the kernel gave, and what communication gave.
    kept = out + returned
    if layout.ulysses > 1:
        kept += _BF16 * shape.head_dim * (sent.query + 2 * sent.kv)
    if layout.gather > 1:
        kept += _BF16 * shape.head_dim * 2 * sent.kv * layout.gather
    exchange = 2 * qkv if group.cp_degree > 1 else 0  # gradients as the kernel writes them, and as they are sent
    return LayerActivations(
        attention=norm + rope + qkv + out + returned,
        mlp=norm + 4 * _BF16 * shape.intermediate_dim,
        recomputed={"full": residual, "selective": residual + kept, "offload": 0}[group.ac_mode],
        # Gradients of the residual stream, of the output and of queries, keys and values; flash sums the queries' in fp32.
        attention_work=residual + qkv + (_BF16 + _FP32) * shape.head_dim * sent.query + exchange,
        # The product's gradient has replaced the product; the gradients of its two factors come on top.
        mlp_work=residual + 2 * _BF16 * shape.intermediate_dim,
        exchange=exchange,
    )


@dataclass(frozen=True, slots=True)
class Moment:
    """What is alive at one moment of the step: ``name``, and bytes by part."""

    name: str
    parts: dict[str, float]

    @property
    def gib(self) -> float:
        """All parts together."""
        return sum(self.parts.values()) / GIB


class MemoryModel:
    """Modelled memory of one rank, by moments of a step; the fullest one decides what fits.

    Args:
        shape: of the decoder. Embedding and output projection are sharded by themselves (``custom_sharded_layers``); where
            they are one, it stays gathered.
        world_size: ranks of the run.
        shard_degree: ranks that shard weights, gradients and optimizer states; all of them where left out.
        states: bytes per weight.
        accumulation: what of the gradients lies between micro-steps: ``none`` (a step is one), ``sharded``, or ``whole``
            (``fsdp_sharded_accumulation: False``).
        layout: how the ranks of a pack divide attention, from ``(cp_degree, doc_lens, padded)``; Ulysses where left out.

    Raises:
        ConfigError: ``world_size`` is below 1, or there is no such accumulation.
    """

    def __init__(
        self,
        shape: DecoderShape,
        *,
        world_size: int,
        shard_degree: int | None = None,
        states: StateBytes = BF16_ADAMW,
        accumulation: str = "none",
        layout: Callable[[int, Sequence[int], int], CpDegrees] | None = None,
    ) -> None:
        if world_size < 1:
            raise ConfigError(f"world_size={world_size} must be at least 1")
        if accumulation not in ("none", "sharded", "whole"):
            raise ConfigError(f"accumulation={accumulation!r} must be none, sharded or whole")
        self.shape = shape
        self.world_size = world_size
        self.shard_degree = shard_degree or world_size
        self.states = states
        self.accumulation = accumulation
        self._layout = layout

    def peak(self, group: PackingGroup) -> Moment:
        """Give the fullest moment of a step with a pack that is one document.

        Args:
            group: pack length, CP degree and recomputation.
        """
        check_groups([group], self.world_size)
        check_ac_layers([group], self.shape.num_layers)
        layout = self._layout(group.cp_degree, [group.pack_len], group.pack_len) if self._layout else None
        return max(self._moments(group, layout), key=lambda moment: moment.gib)

    def fewest_ac_layers(self, group: PackingGroup, budget_gib: float) -> int | None:
        """Give the fewest ``ac_layers`` with which the group fits; None where it does not with all of them.

        Args:
            group: all but its ``ac_layers`` counts.
            budget_gib: memory of the device.
        """
        for ac_layers in range(self.shape.num_layers + 1):
            if self.peak(replace(group, ac_layers=ac_layers)).gib <= budget_gib:
                return ac_layers
        return None

    def _moments(self, group: PackingGroup, layout: CpDegrees | None) -> Iterator[Moment]:
        shape, states = self.shape, self.states
        local_len = group.pack_len // group.cp_degree
        layer = layer_activations(shape, group, layout)
        always = {
            "weights": states.weight * shape.num_params / self.shard_degree,
            "optimizer": states.optimizer * shape.num_params / self.shard_degree,
            "rope_table": _FP32 * shape.head_dim * group.pack_len,
            "reserve": RESERVE_BYTES,
        }

        def kept(before: int) -> dict[str, float]:
            """Count what layers before the given one keep for their backward."""
            recomputed = min(group.ac_layers, before)
            return {
                "saved_inputs": recomputed * layer.recomputed * local_len,
                "saved_activations": (before - recomputed) * (layer.attention + layer.mlp) * local_len,
            }

        yield Moment("optimizer", always | {"gradients": states.weight * shape.num_params / self.shard_degree})
        whole = always | kept(shape.num_layers) | self._gradients(shape.num_layers)
        yield Moment("loss head", whole | self._loss_head(local_len))
        # Gradients through the norm are four more tensors in fp32 beside what it saved.
        norm = {"working_set": (_norm_bytes(shape) + 4 * _FP32 * shape.embed_dim) * local_len}
        yield Moment("final norm", whole | norm | {"communication": self._reduced(shape.num_layers) + _BF16 * shape.layer_params})
        for index in range(shape.num_layers):
            common = always | kept(index) | self._gradients(index + 1) | self._gathered(index)
            # An input that was offloaded is back.
            own = max(layer.recomputed, _BF16 * shape.embed_dim) if index < group.ac_layers else 0
            mlp = {"working_set": (own + layer.attention + layer.mlp + layer.mlp_work) * local_len}
            yield Moment(f"feed-forward of layer {index}", common | mlp)
            attention = (own + layer.attention + layer.attention_work - layer.exchange) * local_len
            communication = common["communication"] + layer.exchange * local_len
            yield Moment(f"attention of layer {index}", common | {"working_set": attention, "communication": communication})

    def _gradients(self, done: int) -> dict[str, float]:
        """Count the gradients that are there when the backward is done with the layers from ``done`` on."""
        if self.accumulation == "whole":
            return {"unsharded_gradients": self.states.weight * self.shape.num_params}
        if self.accumulation == "sharded":
            return {"gradients": self.states.weight * self.shape.num_params / self.shard_degree}
        params = (self.shape.num_layers - done) * self.shape.layer_params
        params += self.shape.vocab_params if done < self.shape.num_layers else 0
        return {"gradients": self.states.weight * params / self.shard_degree}

    def _reduced(self, index: int) -> float:
        """Count gradients that are being reduced in the backward of a layer: those of the unit after it."""
        is_last = index >= self.shape.num_layers - 1 and not self.shape.tied
        params = self.shape.vocab_params if is_last else self.shape.layer_params
        return 0 if self.accumulation == "whole" else self.states.weight * params

    def _gathered(self, index: int) -> dict[str, float]:
        """Count gathered weights and whole gradients in the backward of a layer; FSDP2 works one layer ahead and behind."""
        shape = self.shape
        tied = shape.vocab_params if shape.tied else 0
        down = shape.embed_dim * shape.intermediate_dim  # the first gradient of the layer, there when most else is
        return {
            "gathered_weights": _BF16 * (shape.layer_params + tied),
            "layer_gradients": _BF16 * down + self.states.weight * tied,
            "communication": _BF16 * shape.layer_params + self._reduced(index),
        }

    def _loss_head(self, local_len: int) -> dict[str, float]:
        """Count the default head's pass over chunks, which ends the forward: logits of embed_dim / 2 tokens at a time."""
        shape = self.shape
        hidden = _BF16 * shape.embed_dim
        chunk = max(256, shape.embed_dim // 2)
        logits = (_BF16 + _FP32) * chunk * shape.vocab_size
        return {
            "gathered_weights": _BF16 * shape.vocab_params,
            # Hidden states, their gradients, what the norm before them saved, the weight's gradient in fp32, and logits.
            "loss_head": (_norm_bytes(shape) + 2 * hidden) * local_len + _FP32 * shape.vocab_params + logits,
            "communication": _BF16 * shape.vocab_params,  # FSDP2 lets go of what it received at the next gathering
        }


def _norm_bytes(shape: DecoderShape) -> int:
    """Count what torchtune's RMSNorm saves: in fp32 beside bf16 weights, op by op, its input, normalised input and scale."""
    return 2 * _FP32 * shape.embed_dim + _FP32
