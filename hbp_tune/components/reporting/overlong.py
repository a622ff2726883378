"""Samples longer than every group: counted, listed by row, never dropped silently."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hbp_tune.components.planning.groups import describe_overlong
from hbp_tune.components.planning.records import EpochPlan


def report_overlong(plan: EpochPlan, lengths: NDArray[np.int32], sources: NDArray[np.int16], directory: Path) -> str | None:
    """Write the samples that were dropped or truncated to ``directory/overlong.csv``.

    Args:
        plan: says which samples these are.
        lengths: ``int32[num_samples]``, as in the data set.
        sources: ``int16[num_samples]``, which data set a sample comes from; rows are counted in each.
        directory: of the run.

    Returns:
        One line for people, or nothing where every sample fits.
    """
    path = directory / "overlong.csv"
    path.unlink(missing_ok=True)  # an earlier run's
    for what, ids in (("dropped", plan.dropped), ("truncated", plan.truncated)):
        if not len(ids):
            continue
        first_of_source = np.searchsorted(sources, np.arange(int(sources[-1]) + 1))
        directory.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("sample_id", "dataset", "row", "num_tokens"))
            for i in np.unique(ids):
                writer.writerow((int(i), int(sources[i]), int(i - first_of_source[sources[i]]), int(lengths[i])))
        return f"{describe_overlong(ids, lengths, plan.groups[-1])}; {what}, all listed in {path}"
    return None
