"""Curricula that draw from short steps first: the HBP paper's two stages, and any number of them."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.packing.curriculum import Interleave, StepLimit, StepProfile, check_steps


@dataclass(frozen=True, slots=True)
class _Stage:
    """A part of the run that draws from short steps only.

    Args:
        key: of the configuration that has it, for warnings.
        steps: optimizer steps that it lasts, or their share of the run.
        limit: says which steps are short.
    """

    key: str
    steps: float
    limit: StepLimit


class ShortFirst:
    """Starts the run with short steps, then mixes all (HBP paper, section 3.3).

    Args:
        steps: how long it draws from short steps only: a share of the run, such as 0.05, for which an epoch gives at most a third
            of its short steps; or a number of optimizer steps of the run, a third too where they would take all short ones.
        max_pack_len: steps of groups up to this pack length are short; by default those of the shortest group.
        max_len: in its place: steps without a document of more tokens are short, under one-length packing too.
        spacing: how steps are mixed, among the short and afterwards; see `Interleave`.

    Raises:
        ConfigError: an argument is out of range, or both limits are given.
    """

    def __init__(self, steps: float, max_pack_len: int | None = None, max_len: int | None = None, spacing: str = "even") -> None:
        check_steps("curriculum.steps", steps, least=0)
        self._steps = steps
        self._limit = StepLimit("curriculum", max_pack_len, max_len)
        self._mix = Interleave(spacing)

    def order(self, steps: StepProfile, *, first_step: int, epoch: int, seed: int) -> NDArray[np.int64]:
        """Give the order in which the epoch's steps are trained; see `Curriculum`. No short step is a `ConfigError`."""
        wanted = steps.count(self._steps) - first_step
        short = np.flatnonzero(self._limit.is_short(steps)) if wanted > 0 else np.arange(0)
        would_sort = 0 < len(short) <= wanted and len(short) < len(steps)
        if would_sort and not isinstance(self._steps, float):
            warnings.warn(
                f"curriculum.steps={self._steps} would train all {len(short)} short steps of epoch {epoch} before its "
                f"{len(steps) - len(short)} others, and mix none: {len(short) // 3} of them come first, a third; give a "
                f"share of the run, such as steps=0.05, or a number below {first_step + len(short)}",
                stacklevel=2,
            )
        if would_sort or isinstance(self._steps, float):
            wanted = min(wanted, len(short) // 3)
        drawn = short[self._mix.order(steps.take(short), first_step=first_step, epoch=epoch, seed=seed)][: max(wanted, 0)]
        left = np.setdiff1d(np.arange(len(steps)), drawn)
        rest = left[self._mix.order(steps.take(left), first_step=first_step + len(drawn), epoch=epoch, seed=seed)]
        return np.concatenate((drawn, rest))


class Staged:
    """Goes from short steps to longer ones by stages, then mixes all.

    Args:
        stages: in their order, each with ``steps``, the optimizer steps that it lasts or their share of the run, and either
            ``max_pack_len`` or ``max_len``, which say from which steps it draws as for `ShortFirst`. A stage whose steps run out
            gives way to the next one before its time.
        spacing: how the steps of a stage are mixed; see `Interleave`.

    Raises:
        ConfigError: there is no stage, one is incomplete, or their lengths do not grow.
    """

    def __init__(self, stages: Sequence[Mapping[str, Any]], spacing: str = "even") -> None:
        if not stages:
            raise ConfigError("curriculum.stages is empty; give at least one, with steps and max_pack_len or max_len")
        self._stages: list[_Stage] = []
        for index, stage in enumerate(stages):
            before = self._stages[-1] if self._stages else None
            self._stages.append(_read_stage(f"curriculum.stages[{index}]", stage, before))
        self._mix = Interleave(spacing)

    def order(self, steps: StepProfile, *, first_step: int, epoch: int, seed: int) -> NDArray[np.int64]:
        """Give the order in which the epoch's steps are trained; see `Curriculum`. No short step is a `ConfigError`."""
        left, parts = np.arange(len(steps)), []
        step, last_step = first_step, 0
        for stage in self._stages:
            last_step += steps.count(stage.steps)
            wanted = min(last_step - step, len(left))
            if wanted <= 0:
                continue
            short = left[stage.limit.is_short(steps)[left]]
            if len(short) < wanted:
                warnings.warn(
                    f"{stage.key}.steps={stage.steps} asks for {last_step - step} short steps in this epoch, which has "
                    f"{len(short)}; longer ones follow after these",
                    stacklevel=2,
                )
            # Among the short groups, too, the steps of a stage are a mixture in proportion.
            drawn = short[self._mix.order(steps.take(short), first_step=step, epoch=epoch, seed=seed)][:wanted]
            parts.append(drawn)
            left = np.setdiff1d(left, drawn)
            step += len(drawn)
        rest = left[self._mix.order(steps.take(left), first_step=step, epoch=epoch, seed=seed)]
        return np.concatenate((*parts, rest))


def _read_stage(key: str, stage: Mapping[str, Any], before: _Stage | None) -> _Stage:
    """Check a stage by itself and against the one before it.

    Raises:
        ConfigError: it has not the keys of a stage, or is not longer than the one before it.
    """
    limits = [name for name in ("max_pack_len", "max_len") if isinstance(stage, Mapping) and stage.get(name) is not None]
    if len(limits) != 1 or "steps" not in stage or set(stage) - {"steps", "max_pack_len", "max_len"}:
        raise ConfigError(f"{key}={stage} must have steps and either max_pack_len or max_len, and nothing else")
    check_steps(f"{key}.steps", stage["steps"], least=1)
    limit = StepLimit(key, stage.get("max_pack_len"), stage.get("max_len"))
    if before is None:
        return _Stage(key, stage["steps"], limit)
    own, bound = getattr(limit, limits[0]), getattr(before.limit, limits[0])
    if bound is None:
        raise ConfigError(f"{key} has {limits[0]}, the stage before it the other limit; give all stages the same one")
    if own <= bound:
        raise ConfigError(f"{key}.{limits[0]}={own} must be more than {bound} of the stage before it")
    return _Stage(key, stage["steps"], limit)
