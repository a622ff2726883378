"""Everything that a report of a plan shows: one value for the terminal, the JSON file and the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_tune.planning.comparison.metrics import PlanMetrics
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.plans.records import EpochPlan
from hbp_tune.reporting.samples import SampleView


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlanReport:
    """A plan beside one-length packing of the same data.

    Args:
        lengths: ``int32[num_samples]``, of all samples of the data, overlong ones included.
        lengths_from: where the lengths come from, one phrase for people.
        plans: one per epoch; the first is described.
        naive: one-length packing of the same data on the same ranks.
        cost: predicts the seconds.
        metrics: of the first plan.
        baselines: metrics of other plans of the same data by the packer's name; those of ``naive`` are called ``isf``.
        headline: the finding in one sentence.
        warnings: what a person should know before training by the plan.
        seconds: how long each phase of planning took, by the phase's name.
        samples: some of the data, as they are trained; none where lengths alone are known.
    """

    lengths: NDArray[np.int32]
    lengths_from: str
    plans: tuple[EpochPlan, ...]
    naive: EpochPlan
    cost: CostModel
    metrics: PlanMetrics
    baselines: Mapping[str, PlanMetrics]
    headline: str
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float]
    samples: Sequence[SampleView] = ()

    def __post_init__(self) -> None:
        assert self.plans, "a report needs the plan of at least one epoch"
        assert "isf" in self.baselines, "the metrics of the naive plan belong into baselines['isf']"

    @property
    def plan(self) -> EpochPlan:
        """The plan that is described, of the first epoch."""
        return self.plans[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFigures:
    """What a plan makes of one group.

    Args:
        packs: those that hold samples.
        tokens: real ones.
        tokens_per_step: mean over the group's optimizer steps; nothing where the group has none.
        tokens_per_step_cv: coefficient of variation, the standard deviation over the mean.
    """

    name: str
    pack_len: int
    cp_degree: int
    ac_layers: int
    ac_mode: str
    samples: int
    packs: int
    steps: int
    micro_steps: int
    tokens: int
    tokens_per_step: float | None
    tokens_per_step_cv: float | None


def describe_groups(plan: EpochPlan) -> list[GroupFigures]:
    """Count what each group holds, in the order of ``plan.groups``."""
    samples, tokens = np.diff(plan.pack_offsets), plan.sum_per_pack(plan.lengths)
    group_of_step, tokens_of_step = plan.step_groups, plan.step_tokens
    figures = []
    for index, group in enumerate(plan.groups):
        mine, per_step = plan.pack_group == index, tokens_of_step[group_of_step == index]
        figures.append(
            GroupFigures(
                name=group.name,
                pack_len=group.pack_len,
                cp_degree=group.cp_degree,
                ac_layers=group.ac_layers,
                ac_mode=group.ac_mode,
                samples=int(samples[mine].sum()),
                packs=int(np.count_nonzero(samples[mine])),
                steps=len(per_step),
                micro_steps=int(np.count_nonzero(plan.pack_first_rank[mine] == 0)),
                tokens=int(tokens[mine].sum()),
                tokens_per_step=float(per_step.mean()) if len(per_step) else None,
                tokens_per_step_cv=float(per_step.std() / per_step.mean()) if len(per_step) else None,
            )
        )
    return figures
