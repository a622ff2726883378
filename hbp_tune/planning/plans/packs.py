"""Packs while they are planned: compressed rows, no Python object per pack."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numba import njit
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Packs:
    """Some packs of one group.

    Args:
        ids: ``int32[placed]``, sample ids pack by pack.
        offsets: ``int64[packs + 1]``, where each pack starts in ``ids``.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def from_places(cls, ids: NDArray[np.int32], place: NDArray[np.int64], num_packs: int) -> Self:
        """Collect samples by pack; inside a pack they keep their order.

        Args:
            ids: ``int32[n]``.
            place: ``int64[n]``, the pack of each.
            num_packs: packs without a sample count too.
        """
        offsets = np.zeros(num_packs + 1, dtype=np.int64)
        np.cumsum(np.bincount(place, minlength=num_packs), out=offsets[1:])
        return cls(_scatter(ids, place, offsets[:-1].copy()), offsets)

    @classmethod
    def joined(cls, parts: "list[Packs]") -> Self:
        """Put the packs of several parts one after the other."""
        counts = [np.diff(part.offsets) for part in parts]
        ids = np.concatenate([np.empty(0, dtype=np.int32), *(part.ids for part in parts)])
        return cls(ids, np.concatenate(([0], np.cumsum(np.concatenate([np.empty(0, dtype=np.int64), *counts])))))

    def take(self, order: NDArray[np.int64]) -> Self:
        """Give the packs at these positions, in this order."""
        counts = np.diff(self.offsets)[order]
        offsets = np.concatenate(([0], np.cumsum(counts)))
        return type(self)(_gather(self.ids, self.offsets[:-1][order], offsets), offsets)

    def span(self, first: int, last: int) -> Self:
        """Give packs ``first .. last - 1``."""
        offsets = self.offsets[first : last + 1]
        return type(self)(self.ids[offsets[0] : offsets[-1]], offsets - offsets[0])

    def padded(self, num_packs: int) -> Self:
        """Add empty packs until there are ``num_packs``."""
        return type(self)(self.ids, np.append(self.offsets, np.full(num_packs - len(self), self.offsets[-1])))

    def sums(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sum a per-sample value over each pack; ``values`` has an entry for every sample id."""
        return sum_rows(values[self.ids], self.offsets)


def sum_rows(values: NDArray[np.generic], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum ``values`` between neighbouring offsets; empty rows give 0."""
    totals = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    return totals[offsets[1:]] - totals[offsets[:-1]]


@njit(cache=True)  # type: ignore[untyped-decorator]
def _scatter(ids: NDArray[np.int32], place: NDArray[np.int64], cursor: NDArray[np.int64]) -> NDArray[np.int32]:
    """Counting sort of ids by pack; ``cursor`` starts at each pack's offset and is used up."""
    out = np.empty_like(ids)
    for i in range(len(ids)):
        out[cursor[place[i]]] = ids[i]
        cursor[place[i]] += 1
    return out


@njit(cache=True)  # type: ignore[untyped-decorator]
def _gather(ids: NDArray[np.int32], starts: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    """Copy one row after the other."""
    out = np.empty(offsets[-1], dtype=ids.dtype)
    for row in range(len(starts)):
        for i in range(offsets[row], offsets[row + 1]):
            out[i] = ids[starts[row] + i - offsets[row]]
    return out
