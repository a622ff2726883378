"""Samples longer than every group: counted, listed by row, never dropped silently."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hbp_tune.planning.packing.groups import describe_overlong
from hbp_tune.planning.plans.records import EpochPlan
from hbp_tune.reporting.places import COLUMNS, Places


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
    # A weighted data set may draw a sample several times.
    dropped, truncated = np.unique(plan.dropped), np.unique(plan.truncated)
    ids = np.union1d(dropped, truncated)
    if not len(ids):
        return None
    directory.mkdir(parents=True, exist_ok=True)
    is_dropped = np.isin(ids, dropped)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("sample_id", *COLUMNS, "num_tokens", "what"))
        for i, place, was_dropped in zip(ids, places(ids), is_dropped, strict=True):
            writer.writerow((int(i), *place.cells, int(lengths[i]), "dropped" if was_dropped else plan.cut))
    said = ["dropped"] if not len(truncated) else [f"{len(truncated)} cut by {plan.cut}"]
    if len(truncated) and len(dropped):
        said.append(f"{len(dropped)} dropped, as no target of theirs would be left")
    return f"{describe_overlong(ids, lengths, plan.groups[-1])}; {', '.join(said)}, all listed in {path}"
