"""What samples and packs cost: whole numbers to balance by, seconds to foretell."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_tune.components.planning.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What decides the floating-point operations of a decoder.

    Args:
        num_layers: transformer layers.
        linear_params: weights that every token is multiplied by: all but an input embedding that is only looked up.
        attention_dim: query heads times head dimension of one layer.

    Raises:
        ConfigError: a value is below 1.
    """

    num_layers: int
    linear_params: int
    attention_dim: int

    def __post_init__(self) -> None:
        for field in ("num_layers", "linear_params", "attention_dim"):
            if getattr(self, field) < 1:
                raise ConfigError(f"model shape: {field}={getattr(self, field)} must be at least 1")

    @property
    def token_flops(self) -> int:
        """Operations per token outside attention, forward and backward."""
        return 6 * self.linear_params

    @property
    def square_flops(self) -> int:
        """Operations of causal attention per ``len ** 2`` of a document, forward and backward."""
        return 6 * self.num_layers * self.attention_dim


LLAMA3_1_8B = ModelShape(num_layers=32, linear_params=7_504_924_672, attention_dim=4096)

# What an H100 reaches, fitted to the seven timings with full-length documents in the HBP paper (table of recomputed layers
# at 32K to 128K and cp 2 to 16; rms 1.2%, largest error 2%): Llama 3.1 8B takes 109.6 us a token and 2.64 ns per len ** 2,
# recomputing all layers adds 0.3, Ulysses 42 us a token inside a node of 8 and 138 us across nodes.
_TOKEN_FLOPS_PER_S = 411e12
_SQUARE_FLOPS_PER_S = 298e12
_RECOMPUTE_SHARE = 0.3
_RANKS_PER_NODE = 8
_EXCHANGE_S = 42e-6 / (32 * 4096)  # per token, layer and attention dimension
_EXCHANGE_ACROSS_NODES_S = 138e-6 / (32 * 4096)
# Gathering weights and scattering gradients bounds a micro-step from below: the paper's run without packing, 38.3 GPU days
# on 32 GPUs for 941K samples on four replicas, took 0.44 s for each.
_GATHER_S = 0.44 / 7.505e9 * 32 / 31  # per parameter, to and from all other ranks


class CostModel:
    """Costs of samples and packs for one model shape.

    Whole-number costs decide plans, so that these are the same on every machine; seconds only describe them. The seconds
    are modelled for H100 GPUs from the timings that the HBP paper reports, whatever machine the plan runs on: good for
    comparing plans, and for a first estimate.

    Args:
        shape: of the model; Llama 3.1 8B by default.

    Attributes:
        double_len: tokens at which attention costs a document as much as everything else does, ``c1 / c2`` of
            ``c1 * len + c2 * len ** 2``.
    """

    def __init__(self, shape: ModelShape = LLAMA3_1_8B) -> None:
        self.shape = shape
        self.token_s = shape.token_flops / _TOKEN_FLOPS_PER_S
        self.square_s = shape.square_flops / _SQUARE_FLOPS_PER_S
        # Underestimating attention by half costs 4% of the time, overestimating it 0.3 to 0.8%: rounding matters little.
        self.double_len = max(1, round(self.token_s / self.square_s))

    def sample_cost(self, lengths: NDArray[np.integer]) -> NDArray[np.int64]:
        """Cost of each document, ``len * (len + double_len)``: proportional to its time, linear part and attention."""
        wide = lengths.astype(np.int64)
        return wide * (wide + self.double_len)

    def pack_cost(self, tokens: NDArray[np.int64], squares: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cost of packs from their ``sum(len)`` and ``sum(len ** 2)``."""
        return tokens * self.double_len + squares

    def pack_s(
        self,
        cost: NDArray[np.int64],
        tokens: NDArray[np.int64],
        cp_degree: NDArray[np.int64],
        ac_layers: NDArray[np.int64],
        keeps_attention: NDArray[np.bool_] | bool = False,
    ) -> NDArray[np.float64]:
        """Modelled seconds that each rank of a pack computes and exchanges, gathering of weights apart.

        The exchange is that of the paper's runs, which recompute most layers: an upper bound where attention is kept, for then
        it is not repeated.

        Args:
            cost: ``int64[packs]``, from `pack_cost`.
            tokens: ``int64[packs]``, real tokens.
            cp_degree: ``int64[packs]``, ranks that share each pack.
            ac_layers: ``int64[packs]``, recomputed layers.
            keeps_attention: ``bool[packs]``, whether those recompute all but attention (``ac_mode`` selective).
        """
        repeated = np.where(keeps_attention, tokens * self.double_len, cost)
        recompute = _RECOMPUTE_SHARE * ac_layers / self.shape.num_layers
        inside = (np.minimum(cp_degree, _RANKS_PER_NODE) - 1) / cp_degree
        across = np.maximum(cp_degree - _RANKS_PER_NODE, 0) / cp_degree
        exchange_s = (inside * _EXCHANGE_S + across * _EXCHANGE_ACROSS_NODES_S) * self.shape.num_layers * self.shape.attention_dim
        return ((cost + repeated * recompute) * self.square_s + tokens * exchange_s) / cp_degree

    def gather_s(self, world_size: int) -> float:
        """Modelled seconds of gathering weights and scattering gradients in a micro-step; overlaps with computing."""
        return self.shape.linear_params * _GATHER_S * (world_size - 1) / world_size
