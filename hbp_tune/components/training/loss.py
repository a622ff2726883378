"""Loss normalisers: pure functions from the plan and target counts to the weight of every target.

The loss of an optimizer step is always ``sum(weight * cross_entropy)`` over ranks, shards and micro-steps. Weights are
known before the forward, so no collective is needed to scale anything.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hbp_tune.components.planning.planner import targets_per_step
from hbp_tune.components.planning.records import EpochPlan


class LossNormalizer(Protocol):
    """Decides what each target weighs in the loss of its optimizer step."""

    def document_weights(self, plan: EpochPlan, num_targets: NDArray[np.int32]) -> NDArray[np.float64]:
        """Give the weight of each target of every placed sample.

        Args:
            plan: of the epoch.
            num_targets: ``int32[num_samples]``, targets of each sample at its planned length.

        Returns:
            ``float64[placed]``, aligned with ``plan.sample_ids``.
        """
        ...


class AveTokenLoss:
    """Every target token of an optimizer step weighs the same (HBP paper, section 3.3, Ave-Token).

    The same normalisation as torchtune's recipe: sum of token losses over the step, divided by its targets, whatever
    the replica, pack, shard or micro-step that a token is in.
    """

    def document_weights(self, plan: EpochPlan, num_targets: NDArray[np.int32]) -> NDArray[np.float64]:
        """Give each target 1 / targets of its step; see `LossNormalizer`."""
        return 1.0 / targets_per_step(plan, num_targets)[plan.pack_step[plan.pack_of_sample]]
