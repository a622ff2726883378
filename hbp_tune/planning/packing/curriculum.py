"""The order of an epoch's steps: stateless functions that permute steps, never make or drop one."""

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.plans.hashing import hashed_order

SPACINGS = ("even", "random")


@dataclass(frozen=True, slots=True, eq=False)
class StepProfile:
    """What a curriculum knows of the steps of an epoch, which stand in random order within each group.

    Args:
        pack_lens: ``int64[num_steps]``, the pack length of each step's group, in tokens.
        longest: ``int32[num_steps]``, tokens of the longest document of each step.
        run_steps: optimizer steps of the whole run, as far as one epoch tells; by default it is the run.
    """

    pack_lens: NDArray[np.int64]
    longest: NDArray[np.int32]
    run_steps: int | None = None

    def __len__(self) -> int:
        return len(self.pack_lens)

    def take(self, chosen: NDArray[np.int64]) -> Self:
        """Give the steps at these positions, in this order."""
        return type(self)(self.pack_lens[chosen], self.longest[chosen], self.run_steps)

    def count(self, steps: float) -> int:
        """Give a number of optimizer steps: as it is, or of a share of the run."""
        return steps if isinstance(steps, int) else round(steps * (self.run_steps or len(self)))


class Curriculum(Protocol):
    """Orders the steps of an epoch."""

    def order(self, steps: StepProfile, *, first_step: int, epoch: int, seed: int) -> NDArray[np.int64]:
        """Give the order in which the epoch's steps are trained.

        Args:
            steps: of the epoch.
            first_step: optimizer steps of the run before this epoch.
            epoch: counted from 0.
            seed: of the run; with ``epoch`` decides every shuffle.

        Returns:
            ``int64[num_steps]``, a permutation: the step to train at each position.
        """
        ...


class Interleave:
    """Mixes the groups in proportion to their steps.

    Args:
        spacing: ``even`` spreads each group evenly over the epoch; ``random`` shuffles the steps of all groups.

    Raises:
        ConfigError: there is no such spacing.
    """

    def __init__(self, spacing: str = "even") -> None:
        if spacing not in SPACINGS:
            raise ConfigError(f"curriculum.spacing={spacing!r} must be one of {', '.join(SPACINGS)}")
        self.spacing = spacing

    def order(self, steps: StepProfile, *, first_step: int, epoch: int, seed: int) -> NDArray[np.int64]:
        """Give the order in which the epoch's steps are trained; see `Curriculum`."""
        if self.spacing == "random":
            # By first step, so that the parts of an epoch that a curriculum orders one by one are unrelated.
            return hashed_order(len(steps), seed=seed, epoch=epoch, stream=f"curriculum from step {first_step}")
        position = np.empty(len(steps))
        for pack_len in np.unique(steps.pack_lens):
            members = np.flatnonzero(steps.pack_lens == pack_len)
            position[members] = (np.arange(len(members)) + 0.5) / len(members)
        return np.lexsort((steps.pack_lens, position))


@dataclass(frozen=True, slots=True)
class StepLimit:
    """Up to where a step is short: by the pack length of its group or, under one-length packing too, by its longest document.

    Args:
        key: of the configuration that has it, for errors.
        max_pack_len: steps of groups up to this pack length are short.
        max_len: steps without a document of more tokens are short. Without either, those of the shortest group.

    Raises:
        ConfigError: a value is not a whole number of at least 1, or both are given.
    """

    key: str
    max_pack_len: int | None
    max_len: int | None

    def __post_init__(self) -> None:
        for name in ("max_pack_len", "max_len"):
            if getattr(self, name) is not None:
                check_whole(f"{self.key}.{name}", getattr(self, name), least=1)
        if self.max_pack_len is not None and self.max_len is not None:
            raise ConfigError(
                f"{self.key}: max_pack_len={self.max_pack_len} and max_len={self.max_len} both say what is short; give one"
            )

    def is_short(self, steps: StepProfile) -> NDArray[np.bool_]:
        """Tell which steps are short, ``bool[num_steps]``.

        Raises:
            ConfigError: none is.
        """
        if self.max_len is not None:
            short = steps.longest <= self.max_len
            if not short.any():
                raise ConfigError(
                    f"{self.key}.max_len={self.max_len} leaves no step: each has a document of {steps.longest.min()} tokens or "
                    f"more; raise it, lower planner.tokens_per_step, or give short samples a group of their own"
                )
            return short
        limit = steps.pack_lens.min() if self.max_pack_len is None else self.max_pack_len
        short = steps.pack_lens <= limit
        if not short.any():
            raise ConfigError(
                f"{self.key}.max_pack_len={limit} is shorter than every group; the shortest has pack_len={steps.pack_lens.min()}"
            )
        return short


class LinearRamp:
    """Lets the density of long steps rise linearly to its steady value, where it stays.

    Every long step of an epoch is trained in it, so that those that the ramp holds back make its steady value higher than
    their share of the epoch; where it would want more long steps than there is room for, only long ones are trained.

    Args:
        steps: optimizer steps of the run after which the density is steady, or their share of the run, such as 0.1.
        start: the density at the start of the run, over the steady one, 0 to 1.
        max_pack_len: steps of groups above this pack length are long; by default those of all groups but the shortest.
        max_len: in its place: steps with a document of more tokens are long.

    Raises:
        ConfigError: an argument is out of range, or both limits are given.
    """

    def __init__(self, steps: float, start: float = 0.0, max_pack_len: int | None = None, max_len: int | None = None) -> None:
        check_steps("curriculum.steps", steps, least=1)
        if not 0 <= start <= 1:
            raise ConfigError(f"curriculum.start={start} must be 0 to 1: the first density of long steps over the steady one")
        self.steps = steps
        self.start = start
        self._limit = StepLimit("curriculum", max_pack_len, max_len)

    def order(self, steps: StepProfile, *, first_step: int, epoch: int, seed: int) -> NDArray[np.int64]:
        """Give the order in which the epoch's steps are trained; see `Curriculum`. No short step is a `ConfigError`."""
        mixed = Interleave().order(steps, first_step=first_step, epoch=epoch, seed=seed)
        until = steps.count(self.steps)
        if first_step >= until:
            return mixed
        is_long = ~self._limit.is_short(steps)[mixed]
        progress = np.minimum((np.arange(first_step, first_step + len(steps)) + 0.5) / until, 1.0)
        long_until = _cumulate(self.start + (1.0 - self.start) * progress, int(is_long.sum()))
        # The i-th of them comes where the density adds up to i + 0.5; the short ones take the places between.
        is_long_place = np.diff(np.floor(long_until + 0.5), prepend=0.0) > 0
        order = np.empty_like(mixed)
        order[is_long_place], order[~is_long_place] = mixed[is_long], mixed[~is_long]
        return order


def _cumulate(density: NDArray[np.float64], total: int) -> NDArray[np.float64]:
    """Scale a growing density to a total, at most 1 at each place, and sum it up.

    Args:
        density: ``float64[n]``, positive.
        total: at most n.

    Returns:
        ``float64[n]``, the sum up to and with each place; the last is ``total``.
    """
    places, sums = len(density), np.cumsum(density)
    full = np.arange(total + 1)  # places at the end that a larger and larger scale would fill above 1
    full = full[full < places]
    scales = (total - full) / sums[places - 1 - full]
    num_full = int(np.argmax(scales * density[places - 1 - full] <= 1.0))
    cumulated: NDArray[np.float64] = sums * scales[num_full]
    cumulated[places - num_full :] = total - np.arange(num_full)[::-1]
    cumulated[-1] = total
    return cumulated


def check_steps(key: str, value: object, *, least: int) -> None:
    """Refuse anything but whole numbers from a bound on, and shares of the run.

    Raises:
        ConfigError: it is another.
    """
    if isinstance(value, float) and 0 < value < 1:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}={value!r} must be a whole number of at least {least}, or a share of the run between 0 and 1")


def check_whole(key: str, value: object, *, least: int) -> None:
    """Refuse anything but whole numbers from a bound on.

    Raises:
        ConfigError: it is another.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}={value!r} must be a whole number of at least {least}")
