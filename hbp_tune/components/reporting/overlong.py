"""Samples longer than every group: counted, listed by row, never dropped silently."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hbp_tune.components.planning.groups import describe_overlong
from hbp_tune.components.planning.records import EpochPlan
from hbp_tune.components.reporting.places import COLUMNS, Places


def report_overlong(plan: EpochPlan, lengths: NDArray[np.int32], directory: Path, places: Places) -> str | None:
    """Write the samples that were dropped or truncated to ``directory/overlong.csv``.

    Args:
        plan: says which samples these are.
        lengths: ``int32[num_samples]``, as in the data set.
        directory: of the run.
        places: gives the rows that samples come from.

    Returns:
        One line for people, or nothing where every sample fits.
    """
    path = directory / "overlong.csv"
    path.unlink(missing_ok=True)  # an earlier run's
    for what, drawn in (("dropped", plan.dropped), ("truncated", plan.truncated)):
        if not len(drawn):
            continue
        ids = np.unique(drawn)  # a weighted data set may draw a sample several times
        directory.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("sample_id", *COLUMNS, "num_tokens"))
            for i, place in zip(ids, places(ids), strict=True):
                writer.writerow((int(i), *place.cells, int(lengths[i])))
        return f"{describe_overlong(ids, lengths, plan.groups[-1])}; {what}, all listed in {path}"
    return None
