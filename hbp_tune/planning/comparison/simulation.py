"""Runs a plan through the cost model: what every rank does when, and where the time goes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.balancing import attention_work
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup

SHARES = ("linear", "attention", "recompute", "exchange", "fixed", "gather", "idle")
_DAY_S = 86_400


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackWork:
    """Packs as a simulator sees them: numbers, in the order of training. Unlike a plan's, CP degrees may differ in a micro-step.

    Args:
        tokens: ``int64[packs]``, real tokens.
        squares: ``int64[packs]``, ``sum(len ** 2)``.
        cp_degree: ``int64[packs]``, ranks that share each; those of a micro-step add up to the ranks of the run.
        ac_layers: ``int64[packs]``, recomputed layers.
        keeps_attention: ``bool[packs]``, recomputation leaves attention out.
        micro_step_starts: ``int64[micro_steps]``, index of the first pack of each.
        world_size: ranks of the run.
    """

    tokens: NDArray[np.int64]
    squares: NDArray[np.int64]
    cp_degree: NDArray[np.int64]
    ac_layers: NDArray[np.int64]
    keeps_attention: NDArray[np.bool_]
    micro_step_starts: NDArray[np.int64]
    world_size: int

    @classmethod
    def of_plan(cls, plan: EpochPlan) -> "PackWork":
        """Take the packs of a plan."""
        return cls(
            tokens=plan.sum_per_pack(plan.lengths),
            squares=plan.sum_per_pack(attention_work(plan.lengths)),
            cp_degree=plan.cp_degrees.astype(np.int64),
            ac_layers=np.array([group.ac_layers for group in plan.groups])[plan.pack_group],
            keeps_attention=np.array([group.ac_mode == "selective" for group in plan.groups])[plan.pack_group],
            micro_step_starts=plan.micro_step_starts,
            world_size=plan.world_size,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Simulation:
    """A simulated epoch.

    Args:
        world_size: ranks.
        micro_step_s: ``float64[micro_steps]``, seconds of each: every one is a synchronisation, as FSDP gathers weights in it.
        busy_s: ``float64[packs]``, seconds that each rank of a pack is busy.
        exchange_s: ``float64[packs]``, those of them in which it exchanges tokens with the pack's other ranks.
        shares: of all ranks' seconds, by name of `SHARES`; they add up to 1. ``gather`` is what computing does not hide, ``idle``
            what ranks wait for the slowest one.
    """

    world_size: int
    micro_step_s: NDArray[np.float64]
    busy_s: NDArray[np.float64]
    exchange_s: NDArray[np.float64]
    shares: dict[str, float]

    @property
    def epoch_s(self) -> float:
        """Seconds of the epoch."""
        return float(self.micro_step_s.sum())

    @property
    def gpu_days(self) -> float:
        """Days of all GPUs together."""
        return self.epoch_s * self.world_size / _DAY_S


def simulate(work: PackWork, cost: CostModel) -> Simulation:
    """Run packs through the cost model.

    Args:
        work: of one epoch.
        cost: of the model on the machine.
    """
    seconds = cost.pack_seconds(work.tokens, work.squares, work.cp_degree, work.ac_layers, work.keeps_attention)
    busy_s = seconds.total + cost.micro_step_s
    slowest_s = np.maximum.reduceat(busy_s, work.micro_step_starts)
    micro_step_s = np.maximum(slowest_s, cost.gather_s(work.world_size))
    all_ranks_s = float(micro_step_s.sum()) * work.world_size

    def share(part: NDArray[np.float64]) -> float:
        return float((part * work.cp_degree).sum()) / all_ranks_s

    shares = {name: share(getattr(seconds, name)) for name in ("linear", "attention", "recompute", "exchange")}
    shares["fixed"] = share(np.full(len(busy_s), cost.micro_step_s))
    shares["gather"] = float((micro_step_s - slowest_s).sum()) * work.world_size / all_ranks_s
    shares["idle"] = max(0.0, 1.0 - sum(shares.values()))
    return Simulation(
        world_size=work.world_size, micro_step_s=micro_step_s, busy_s=busy_s, exchange_s=seconds.exchange, shares=shares
    )


def ideal_s(lengths: NDArray[np.int32], cost: CostModel, group: PackingGroup, world_size: int) -> float:
    """Bound an epoch's seconds from below: perfect balance, no communication, and one group's recomputation for all.

    Args:
        lengths: ``int32[num_samples]``.
        cost: of the model on the machine.
        group: with the least recomputation.
        world_size: ranks of the run.
    """
    wide = lengths.astype(np.int64)
    sums = (wide.sum(keepdims=True), (wide**2).sum(keepdims=True))
    alone = cost.pack_seconds(*sums, np.array([1]), np.array([group.ac_layers]), group.ac_mode == "selective")
    return float(alone.total[0]) / world_size
