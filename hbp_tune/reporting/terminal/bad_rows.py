"""Rows that are not training samples: counted, listed by file and row, never dropped silently."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hbp_tune.errors import DataError
from hbp_tune.reporting.places import COLUMNS, RowPlace

_SHOWN = 3


def kind_of_reason(reason: str) -> str:
    """Give the reason without the row's own numbers, by which rows are counted."""
    return re.sub(r"(?<!UTF-)\b\d+", "#", reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRowList:
    """The bad rows of all data sets.

    Args:
        num_rows: good ones included.
        listed: place of each bad one, and the reason.
    """

    num_rows: int
    listed: Sequence[tuple[RowPlace, str]]


def report_bad_rows(bad_rows: BadRowList, path: Path, policy: str) -> str | None:
    """Write the bad rows to a table, and end the run where they may not be dropped.

    Args:
        bad_rows: of all data sets.
        path: of the table (CSV); an earlier run's is removed.
        policy: ``error`` or ``drop``.

    Returns:
        One line for people, or nothing where every row is good.

    Raises:
        DataError: the policy is ``error``, and there are bad rows.
    """
    path.unlink(missing_ok=True)
    listed = bad_rows.listed
    if not listed:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow((*COLUMNS, "reason"))
        writer.writerows((*place.cells, reason) for place, reason in listed)
    reasons = Counter(kind_of_reason(reason) for _, reason in listed)
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(_SHOWN))
    more = f" and {len(reasons) - _SHOWN} more reasons" if len(reasons) > _SHOWN else ""
    first = ", ".join(str(place) for place, _ in listed[:_SHOWN])
    line = f"{len(listed)} of {bad_rows.num_rows} rows are not training samples ({counts}{more}), the first: {first}"
    if policy == "error":
        raise DataError(f"{line}; all are listed in {path}: mend them, or set bad_rows=drop to leave them out")
    return f"{line}; left out, all are listed in {path}"
