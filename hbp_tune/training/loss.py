"""Loss normalisers: pure functions from the plan and target counts to the weight of every target.

The loss of an optimizer step is always ``sum(weight * cross_entropy)`` over ranks, shards and micro-steps. Weights are
known before the forward, so no collective is needed to scale anything. ``docs/loss.md`` has the formulas side by side.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hbp_tune.planning.packing.planner import targets_per_step
from hbp_tune.planning.plans.records import EpochPlan


class LossNormalizer(Protocol):
    """Decides what each target weighs in the loss of its optimizer step."""

    def document_weights(self, plan: EpochPlan, num_targets: NDArray[np.int32]) -> NDArray[np.float64]:
        """Give the weight of each target of every placed sample.

        Args:
            plan: of the epoch.
            num_targets: ``int32[num_samples]``, targets of each sample at its planned length.

        Returns:
            ``float64[placed]``, aligned with ``plan.sample_ids``; finite, also where a sample has no target to weigh.
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


class TokenMeanLoss:
    """Every pack weighs the same: the mean over the step's packs of each pack's mean over its targets.

    What a data-parallel run gets when each replica divides by its own targets in each micro-step. A target weighs more
    where its pack has few. Packs without targets do not count.
    """

    def document_weights(self, plan: EpochPlan, num_targets: NDArray[np.int32]) -> NDArray[np.float64]:
        """Give each target 1 / (targets of its pack * packs with targets in its step); see `LossNormalizer`."""
        targets = plan.sum_per_pack(num_targets[plan.sample_ids])
        num_packs = np.bincount(plan.pack_step, weights=targets > 0)[plan.pack_step]
        return _inverse(targets * num_packs)[plan.pack_of_sample]


class SampleMeanLoss:
    """Every sample weighs the same: the mean over the step's samples of each sample's mean over its targets.

    Samples are counted over the whole optimizer step, whatever the replica or micro-step; those without targets do not count.
    """

    def document_weights(self, plan: EpochPlan, num_targets: NDArray[np.int32]) -> NDArray[np.float64]:
        """Give each target 1 / (targets of its sample * samples with targets in its step); see `LossNormalizer`."""
        targets = num_targets[plan.sample_ids]
        step = plan.pack_step[plan.pack_of_sample]
        return _inverse(targets * np.bincount(step, weights=targets > 0)[step])


class SumLoss:
    """Every target of a group weighs the same, in every step: token losses are summed, not divided by targets (Tulu 3).

    In open-instruct (``reduce_loss=sum``, Tulu 3, arXiv 2411.15124) each rank sums the losses of its tokens, and data
    parallelism and accumulation average these sums over ranks and micro-steps. So does this: a target weighs
    1 / (ranks * micro-steps of its step), the ranks of one pack each counted with their share of its tokens.
    Loss and gradient are larger than those of the means by the targets of a rank in a micro-step: thousands. The gradient norm
    that is clipped at, and the learning rate of an optimizer that does not divide it away, must be chosen for that.
    """

    def document_weights(self, plan: EpochPlan, num_targets: NDArray[np.int32]) -> NDArray[np.float64]:
        """Give each target 1 / (ranks * micro-steps of its step); see `LossNormalizer`."""
        micro_steps = np.bincount(plan.pack_step[plan.micro_step_starts])
        return 1.0 / (plan.world_size * micro_steps[plan.pack_step[plan.pack_of_sample]])


class LongAlignLoss:
    """LongAlign's loss weighting: every sample weighs the same within its micro-step (arXiv 2401.18058, section 3.3).

    The token losses of a sample with N targets are scaled by K / (N * M), where its batch has K packs and M samples with
    targets, and averaged over the K packs: the mean over the batch's samples. In LongAlign's code a batch is one micro-step
    over all devices, and accumulation averages micro-steps. So a sample weighs more where its micro-step has few, which is all
    that sets it apart from `SampleMeanLoss`; steps of one micro-step are the same. Micro-steps without targets do not count.
    """

    def document_weights(self, plan: EpochPlan, num_targets: NDArray[np.int32]) -> NDArray[np.float64]:
        """Give each target 1 / (targets of its sample * samples of its micro-step * micro-steps); see `LossNormalizer`."""
        targets = num_targets[plan.sample_ids]
        micro_step = np.cumsum(plan.pack_first_rank == 0)[plan.pack_of_sample] - 1
        samples = np.bincount(micro_step, weights=targets > 0, minlength=len(plan.micro_step_starts))
        micro_steps = np.bincount(plan.pack_step[plan.micro_step_starts], weights=samples > 0)
        return _inverse(targets * samples[micro_step] * micro_steps[plan.pack_step[plan.pack_of_sample]])


def _inverse(counts: NDArray[np.number]) -> NDArray[np.float64]:
    """Give 1 / counts, and 0 where there is nothing to count."""
    inverse = np.zeros(len(counts))
    np.divide(1.0, counts, out=inverse, where=counts > 0)
    return inverse
