"""What samples and packs cost: whole numbers to balance by, seconds to predict."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.costs.exchange import AttentionHeads, moved_heads
from hbp_tune.planning.costs.hardware import H100, Rates
from hbp_tune.planning.plans.sharding import CpDegrees


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What decides the floating-point operations of a decoder, and what its ranks send to each other.

    Args:
        num_layers: transformer layers.
        linear_params: weights that every token is multiplied by: all but an input embedding that is only looked up; of
            experts, those that one token uses.
        attention_dim: query heads times head dimension of one layer; where keys and values differ in it, the mean of both.
        heads: of one layer, which context parallelism exchanges; as many for keys and values as for queries where left out.
        head_params: of ``linear_params``, those outside the layers: the output projection.
        gathered_params: weights that FSDP gathers; ``linear_params`` where left out.

    Raises:
        ConfigError: a value is below 1, or ``head_params`` are not among ``linear_params``.
    """

    num_layers: int
    linear_params: int
    attention_dim: int
    heads: AttentionHeads | None = None
    head_params: int = 0
    gathered_params: int | None = None

    def __post_init__(self) -> None:
        for field in ("num_layers", "linear_params", "attention_dim", "gathered_params"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ConfigError(f"model shape: {field}={value} must be at least 1")
        if not 0 <= self.head_params < self.linear_params:
            raise ConfigError(
                f"model shape: head_params={self.head_params} must be at least 0 and below linear_params={self.linear_params}"
            )

    @property
    def token_flops(self) -> int:
        """Operations per token outside attention, forward and backward."""
        return 6 * self.linear_params

    @property
    def square_flops(self) -> int:
        """Operations of causal attention per ``len ** 2`` of a document, forward and backward."""
        return 6 * self.num_layers * self.attention_dim

    def exchanged_bytes(self, cp_degree: int) -> float:
        """Bytes in bf16 that a rank receives by Ulysses for each of its tokens, in one forward of all layers."""
        heads = self.heads or AttentionHeads(query=self.attention_dim, kv=self.attention_dim)
        head_bytes = 2 * self.num_layers * self.attention_dim / heads.query
        return head_bytes * moved_heads(heads, CpDegrees(ulysses=cp_degree), padded=cp_degree, gathered_len=0)


LLAMA3_1_8B = ModelShape(
    num_layers=32,
    linear_params=7_504_924_672,
    attention_dim=4096,
    heads=AttentionHeads(query=32, kv=8),
    head_params=525_336_576,
    gathered_params=8_030_261_248,
)

# Operations outside attention that take as long as one of attention: what plans weigh by, the same for every machine, so that
# plans are. All twelve timings of the HBP paper say 1.34 (H100), its seven with full-length documents 1.38; underestimating
# attention by half costs 4% of the time, overestimating it 0.3 to 0.8%, so the larger weight is taken.
_SQUARE_WEIGHT = 411 / 298
# A backward of linear layers takes two forwards; flash attention's recomputes the scores too: 5 products to 2.
_LINEAR_FORWARD, _ATTENTION_FORWARD = 1 / 3, 2 / 7
# Gathered for the forward and again for the backward, then the gradients scattered, all in bf16.
_GATHERED_BYTES = 3 * 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackSeconds:
    """Modelled seconds of each rank of a pack, by what it does; gathering of weights apart.

    Args:
        linear: ``float64[packs]``, all but attention, forward and backward.
        attention: ``float64[packs]``, forward and backward.
        recompute: ``float64[packs]``, forwards that the backward repeats.
        exchange: ``float64[packs]``, context parallelism's communication.
    """

    linear: NDArray[np.float64]
    attention: NDArray[np.float64]
    recompute: NDArray[np.float64]
    exchange: NDArray[np.float64]

    @property
    def total(self) -> NDArray[np.float64]:
        """Seconds that a rank is busy, ``float64[packs]``: nothing overlaps."""
        return self.linear + self.attention + self.recompute + self.exchange


class CostModel:
    """Costs of samples and packs for one model shape.

    Whole-number costs decide plans, so that these are the same on every machine; seconds only describe them. The seconds
    are modelled from the machine's rates: those of H100 GPUs in the HBP paper, unless others are given. Good for comparing plans,
    and for a first estimate.

    Args:
        shape: of the model; Llama 3.1 8B by default.
        rates: of the machine.

    Attributes:
        double_len: tokens at which attention costs a document as much as everything else does, ``c1 / c2`` of
            ``c1 * len + c2 * len ** 2``, by the weight that is the same for every machine.
        micro_step_s: modelled seconds of every forward and backward beside those of its pack, gathering of weights apart.
    """

    def __init__(self, shape: ModelShape = LLAMA3_1_8B, rates: Rates = H100) -> None:
        self.shape = shape
        self.rates = rates
        self.token_s = shape.token_flops / rates.token_flops_per_s
        self.square_s = shape.square_flops / rates.square_flops_per_s
        self.micro_step_s = rates.micro_step_tokens * self.token_s
        self.double_len = max(1, round(shape.token_flops / shape.square_flops / _SQUARE_WEIGHT))

    def sample_cost(self, lengths: NDArray[np.integer]) -> NDArray[np.int64]:
        """Cost of each document, ``len * (len + double_len)``: about proportional to its time, linear part and attention."""
        wide = lengths.astype(np.int64)
        return wide * (wide + self.double_len)

    def pack_cost(self, tokens: NDArray[np.int64], squares: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cost of packs from their ``sum(len)`` and ``sum(len ** 2)``."""
        return tokens * self.double_len + squares

    def pack_seconds(
        self,
        tokens: NDArray[np.int64],
        squares: NDArray[np.int64],
        cp_degree: NDArray[np.int64],
        ac_layers: NDArray[np.int64],
        keeps_attention: NDArray[np.bool_] | bool = False,
    ) -> PackSeconds:
        """Model what each rank of a pack does, gathering of weights apart.

        The exchange is that of Ulysses, with heads repeated where a degree needs more of them: an upper bound for schemes that
        choose what moves least. Inputs that are offloaded come and go beside the computation: a layer costs as much as one that
        recomputes everything.

        Args:
            tokens: ``int64[packs]``, real tokens.
            squares: ``int64[packs]``, ``sum(len ** 2)``.
            cp_degree: ``int64[packs]``, ranks that share each pack.
            ac_layers: ``int64[packs]``, recomputed layers.
            keeps_attention: ``bool[packs]``, whether those recompute all but attention and its exchange (``ac_mode`` selective).
        """
        shape, rates = self.shape, self.rates
        linear, attention = tokens * self.token_s / cp_degree, squares * self.square_s / cp_degree
        recomputed = ac_layers / shape.num_layers
        repeated = np.where(keeps_attention, 0.0, recomputed)
        in_layers = 1 - shape.head_params / shape.linear_params
        degrees, which = np.unique(cp_degree, return_inverse=True)
        received = (
            tokens / cp_degree * np.array([shape.exchanged_bytes(int(degree)) for degree in degrees])[which] * (2 + repeated)
        )
        across = np.maximum(cp_degree - rates.ranks_per_node, 0) / np.maximum(cp_degree - 1, 1)
        return PackSeconds(
            linear=linear,
            attention=attention,
            recompute=linear * in_layers * _LINEAR_FORWARD * recomputed + attention * _ATTENTION_FORWARD * repeated,
            exchange=received * ((1 - across) / rates.exchange_bytes_per_s + across / rates.network_bytes_per_s),
        )

    def gather_s(self, world_size: int) -> float:
        """Modelled seconds of gathering weights and scattering gradients in a micro-step; overlaps with computing."""
        rates = self.rates
        is_one_node = world_size <= rates.ranks_per_node
        bytes_per_s = rates.gather_bytes_per_s if is_one_node else rates.gather_network_bytes_per_s
        params = self.shape.gathered_params or self.shape.linear_params
        return _GATHERED_BYTES * params * (world_size - 1) / world_size / bytes_per_s
