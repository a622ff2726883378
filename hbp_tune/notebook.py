"""Plans in a notebook or a script: three lines, no torch, no configuration."""

import html
import io
import time
import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from hbp_tune.data.store.lengths import LENGTH_SUFFIXES, read_lengths, whole_lengths
from hbp_tune.errors import ConfigError
from hbp_tune.planning.comparison.distributions import synthetic_lengths
from hbp_tune.planning.comparison.methods import one_length_group, plan_baseline
from hbp_tune.planning.comparison.metrics import PlanMetrics, measure
from hbp_tune.planning.comparison.selection import GroupSelector, candidate_groups, check_candidates
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.costs.hardware import gpu_named, rates_of
from hbp_tune.planning.costs.memory import SAFE_SHARE, MemoryModel
from hbp_tune.planning.costs.models import known_model
from hbp_tune.planning.packing.curriculum import Curriculum
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from hbp_tune.reporting.files.plan_files import plan_summary, plan_table, write_plan
from hbp_tune.reporting.pages.page import render_page
from hbp_tune.reporting.report import PlanReport
from hbp_tune.reporting.terminal.advice import headline, plan_warnings
from hbp_tune.reporting.terminal.tables import print_groups, print_metrics

_TOKENS_PER_STEP = 524_288


def plan(
    lengths: Sequence[int] | NDArray[Any] | str,
    *,
    model: str = "llama3_1_8b",
    world_size: int = 8,
    groups: Sequence[PackingGroup] | None = None,
    gpu: str = "H100",
    memory_gib: float | None = None,
    planner: BalancePlanner | None = None,
    curriculum: Curriculum | None = None,
    seed: int = 0,
) -> "Plan":
    """Plan an epoch from the lengths of its samples.

    Args:
        lengths: tokens of each sample; or a file of them (.csv, .parquet, .npy), or the name of a distribution, such as
            ``tulu3_longcite``.
        model: its name, such as ``qwen3_8b``, or the folder of a checkpoint with its config.json.
        world_size: ranks of the run.
        groups: packing groups, from short to long; chosen by modelled time and counted memory where left out.
        gpu: whose time and memory are modelled.
        memory_gib: of each GPU, that a step may take by count; 90% of what it has where left out.
        planner: by default `BalancePlanner` with 512K tokens a step.
        curriculum: orders the steps; by default all groups in proportion.
        seed: of every shuffle.

    Raises:
        ConfigError: an argument is out of range, or no groups fit.
        DataError: lengths are not whole numbers of at least 1.
    """  # noqa: DOC502 - the functions called here raise the second
    start = time.perf_counter()
    numbers, lengths_from = _lengths(lengths)
    known, machine = known_model(model), gpu_named(gpu)
    cost = CostModel(known.shape, rates_of(machine))
    planner = planner or BalancePlanner(tokens_per_step=_TOKENS_PER_STEP)
    chosen = groups is None
    if groups is None:
        budget_gib = memory_gib or SAFE_SHARE * machine.memory_gib
        memory = MemoryModel(known.decoder, world_size=world_size, accumulation="sharded")
        groups = _choose(numbers, planner=planner, cost=cost, memory=memory, budget_gib=budget_gib, seed=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        made = planner.plan(
            numbers, np.ones_like(numbers), tuple(groups), world_size=world_size, seed=seed, cost=cost, curriculum=curriculum
        )
    return Plan(
        made,
        numbers,
        lengths_from=lengths_from,
        planner=planner,
        cost=cost,
        seed=seed,
        warnings=tuple(dict.fromkeys(str(warning.message) for warning in caught)),
        seconds={"choose and plan" if chosen else "plan": time.perf_counter() - start},
    )


class Plan:
    """An epoch's plan, as a notebook shows it: figures beside one-length packing, a page, a table, a file to train by.

    Args:
        epoch: the plan itself.
        lengths: ``int32[num_samples]``, of all samples.
        lengths_from: where they come from, one phrase.
        planner: that made it.
        cost: that it was made by.
        seed: likewise.
        warnings: of planning.
        seconds: that it took, by phase.
    """

    def __init__(
        self,
        epoch: EpochPlan,
        lengths: NDArray[np.int32],
        *,
        lengths_from: str,
        planner: BalancePlanner,
        cost: CostModel,
        seed: int,
        warnings: tuple[str, ...],
        seconds: dict[str, float],
    ) -> None:
        self.epoch = epoch
        self._lengths, self._lengths_from = lengths, lengths_from
        self._planner, self._cost, self._seed = planner, cost, seed
        self._warnings, self._seconds = warnings, seconds

    @property
    def groups(self) -> tuple[PackingGroup, ...]:
        """The packing groups, from short to long."""
        return self.epoch.groups

    @property
    def metrics(self) -> PlanMetrics:
        """The paper's metrics, modelled time and more."""
        return self.report.metrics

    @cached_property
    def report(self) -> PlanReport:
        """Everything that is said about the plan, beside packing the same samples to one length; made when first asked for."""
        kept = np.setdiff1d(np.arange(len(self._lengths), dtype=np.int32), self.epoch.dropped)
        naive = plan_baseline(
            "isf",
            self._lengths,
            one_length_group(self.epoch.groups, self.epoch.lengths),
            world_size=self.epoch.world_size,
            seed=self._seed,
            tokens_per_step=self._planner.tokens_per_step,
            overlong=self.epoch.cut,
            sample_ids=kept,
        )
        metrics, beside = measure(self.epoch, self._cost), measure(naive, self._cost)
        return PlanReport(
            lengths=self._lengths,
            lengths_from=self._lengths_from,
            plans=(self.epoch,),
            naive=naive,
            cost=self._cost,
            metrics=metrics,
            baselines={"isf": beside},
            headline=headline(self.epoch, naive, metrics=metrics, naive_metrics=beside, cost=self._cost),
            warnings=(*self._warnings, *plan_warnings(self.epoch)),
            seconds=self._seconds,
        )

    def summary(self) -> dict[str, Any]:
        """Give all figures as plain values, as ``plan.json`` has them."""
        return plan_summary(self.report)

    def to_pandas(self) -> Any:
        """Give every placed sample in training order as a pandas ``DataFrame``, with the columns of `write_plan`."""
        return plan_table([self.epoch]).to_pandas()

    def save(self, path: str | Path) -> Path:
        """Write the plan as a file to train by (``plan_file=...``); gives its path."""
        write_plan(Path(path), [self.epoch])
        return Path(path)

    def __repr__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=100, highlight=False, soft_wrap=True)
        console.print(f"{self.report.headline}\n", markup=False)
        print_groups(self.epoch, console)
        rows = {"HBP": self.report.metrics, "isf": self.report.baselines["isf"]}
        print_metrics(rows, console, ranks=self.epoch.world_size, machine=self._cost.rates.machine)
        for line in self.report.warnings:
            console.print(f"warning: {line}", markup=False)
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        # In a frame, so that neither the page's styles nor the notebook's reach the other.
        page = html.escape(render_page(self.report), quote=True)
        return f'<iframe srcdoc="{page}" title="Plan" style="width:100%;height:720px;border:0"></iframe>'


def _lengths(lengths: Sequence[int] | NDArray[Any] | str) -> tuple[NDArray[np.int32], str]:
    """Give the lengths, and where they come from.

    Raises:
        ConfigError: a text is neither a file nor a distribution.
    """
    if not isinstance(lengths, str):
        return whole_lengths(lengths), f"{len(lengths):,} numbers given"
    if lengths.lower().endswith(LENGTH_SUFFIXES):
        return read_lengths(Path(lengths))[0], lengths
    try:
        return synthetic_lengths(lengths)[0], f"synthetic lengths, {lengths}"
    except ConfigError as error:
        raise ConfigError(f"lengths={lengths!r} is not a file ({', '.join(LENGTH_SUFFIXES)}), and {error}") from error


def _choose(
    lengths: NDArray[np.int32],
    *,
    planner: BalancePlanner,
    cost: CostModel,
    memory: MemoryModel,
    budget_gib: float,
    seed: int,
) -> tuple[PackingGroup, ...]:
    """Choose groups as ``hbp plan groups=auto`` does."""
    longest, world_size = int(lengths.max()), memory.world_size
    fewest = partial(memory.fewest_ac_layers, budget_gib=budget_gib)
    candidates = candidate_groups(longest, fewest, world_size=world_size, ac_modes=("full", "selective"))
    check_candidates(candidates, longest if planner.overlong == "error" else 0)
    most = max(group.pack_len for group in candidates)
    kept = np.minimum(lengths, most) if planner.overlong.startswith("truncate") else lengths[lengths <= most]
    return GroupSelector(kept, planner=planner, cost=cost, world_size=world_size, seed=seed).select(candidates).groups
