"""Weighted data sets: which samples an epoch trains, and how often."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.plans.hashing import hashed_order


def draw_samples(sources: NDArray[np.int16], weights: Sequence[float], *, seed: int, epoch: int) -> NDArray[np.int32]:
    """Draw the samples of an epoch by the weights of their data sets.

    Under a weight of 2.3 each sample of a data set is trained twice in the epoch, and three in ten of them once more; under 0.3
    only three in ten of them are trained. Which ones these are is drawn anew in each epoch; how many is not left to chance:
    of a data set with ``count`` samples, ``round((weight - floor(weight)) * count)``.

    Args:
        sources: ``int16[num_samples]``, the data set that each sample comes from.
        weights: of the data sets, by the index in ``sources``.
        seed: of the run; with ``epoch`` decides the draw.
        epoch: counted from 0.

    Returns:
        ``int32[num_drawn]`` sample ids, ascending, as often as they are trained. If all weights are 1, every sample once.

    Raises:
        ConfigError: a weight is not a finite number above 0, or so small that it draws nothing; or a data set has none.
    """
    repeats = np.zeros(len(sources), dtype=np.int64)
    for source in np.unique(sources):
        if source >= len(weights):
            raise ConfigError(f"dataset[{source}] has no weight: {len(weights)} are given; give each data set one")
        weight, members = weights[source], np.flatnonzero(sources == source)
        if not (isinstance(weight, int | float) and math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"dataset[{source}].weight={weight!r} must be a finite number above 0; remove the data set to leave it out"
            )
        whole = math.floor(weight)
        once_more = round((weight - whole) * len(members))
        if whole + once_more == 0:
            raise ConfigError(
                f"dataset[{source}].weight={weight} draws none of its {len(members)} samples; raise it to "
                f"{1 / len(members):.2g}, which draws one, or remove the data set"
            )
        chosen = hashed_order(len(members), seed=seed, epoch=epoch, stream=f"data set {source}")[:once_more]
        repeats[members] = whole
        repeats[members[chosen]] += 1
    return np.repeat(np.arange(len(sources), dtype=np.int32), repeats)
