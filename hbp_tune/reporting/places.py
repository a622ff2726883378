"""Where a row comes from, for lists that people read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("dataset", "file", "row", "line")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlace:
    """A row's place.

    Args:
        dataset: label of its data set.
        file: that holds it; empty where that is not known.
        row: in the file, or in the data set where no file is known; counts from 0.
        line: of a file of JSON lines, blank ones included, as editors count: from 1.
    """

    dataset: str
    file: str = ""
    row: int
    line: int | None = None

    def __str__(self) -> str:
        if self.line is not None:
            return f"{self.file}:{self.line}"
        return f"row {self.row} of {self.file or self.dataset}"

    @property
    def cells(self) -> tuple[str, str, int, int | str]:
        """What stands under `COLUMNS`."""
        return self.dataset, self.file, self.row, "" if self.line is None else self.line


class Places(Protocol):
    """Says which rows samples come from."""

    def __call__(self, sample_ids: NDArray[np.int32], /) -> Sequence[RowPlace]:
        """Give the places of samples, in the order of ``int32[...]`` ids."""
        ...
