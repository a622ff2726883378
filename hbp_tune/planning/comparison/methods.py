"""Plans of the same data by other methods, for comparison: one pack length, no balancing."""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.comparison.baselines import BASELINES
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup

# Sorted batching (LongAlign, arXiv 2401.18058): no packing; the samples of a micro-step are neighbours in length.
_SORTED = "longalign_sorted"
BASELINE_NAMES = (*BASELINES, _SORTED)


def plan_baseline(
    name: str,
    lengths: NDArray[np.int32],
    group: PackingGroup,
    *,
    world_size: int,
    seed: int,
    tokens_per_step: int | None = None,
    overlong: str = "error",
    sample_ids: NDArray[np.int32] | None = None,
) -> EpochPlan:
    """Plan an epoch by a method from the literature: every sample in one group, packs in random order.

    Args:
        name: of `BASELINES`, or ``longalign_sorted``.
        lengths: ``int32[num_samples]``.
        group: that all samples go to.
        world_size: ranks of the run.
        seed: of every shuffle.
        tokens_per_step: as for `BalancePlanner`.
        overlong: as for `BalancePlanner`.
        sample_ids: ``int32[num_drawn]``, as for `BalancePlanner.plan`.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in BASELINE_NAMES:
        raise ConfigError(f"baseline {name!r} is unknown; choose from {', '.join(BASELINE_NAMES)}")
    packer = BASELINES["none" if name == _SORTED else name]()
    sort_by = "tokens" if name == _SORTED else None
    planner = BalancePlanner(tokens_per_step, overlong, mode="paper", packer=packer, fill=False, sort_by=sort_by)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is worth saying is said about the plan that is trained
        # These plans are not trained, so targets play no part: every sample counts as having one.
        ones = np.ones_like(lengths)
        return planner.plan(lengths, ones, [group], world_size=world_size, seed=seed, sample_ids=sample_ids)


def one_length_group(groups: Sequence[PackingGroup], lengths: NDArray[np.int32]) -> PackingGroup:
    """Give the group that one-length packing would use: the shortest that holds every sample, or the longest."""
    longest = int(lengths.max())
    return next((group for group in groups if group.pack_len >= longest), groups[-1])


def plan_comparison(plan: EpochPlan, planner: BalancePlanner, *, seed: int, cost: CostModel) -> dict[str, EpochPlan]:
    """Put a plan beside naive packing of the same samples: ISF to one length, no balancing.

    Where one long pack takes all ranks there is a single replica, which is balanced by definition; then both are planned for
    four times as many ranks.

    Args:
        plan: that is trained.
        planner: that made it.
        seed: of the run.
        cost: of the model that is trained.

    Returns:
        Plans by a name for people, on as many ranks as each other.
    """
    lengths = plan.lengths[np.argsort(plan.sample_ids)]  # as trained: without those that were dropped
    ranks = plan.world_size
    if ranks == plan.groups[-1].cp_degree:
        ranks *= 4
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = planner.plan(lengths, np.ones_like(lengths), plan.groups, world_size=ranks, seed=seed, cost=cost)
    group = one_length_group(plan.groups, lengths)
    steps = planner.tokens_per_step
    return {
        "HBP": plan,
        "one length": plan_baseline("isf", lengths, group, world_size=ranks, seed=seed, tokens_per_step=steps),
    }
