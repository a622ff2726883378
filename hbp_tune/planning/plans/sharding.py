"""Which rows of a pack a context-parallel rank holds: integer arithmetic, testable for all ranks in one process."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

# Shards are multiples of this many tokens over the whole pack, so that kernels see aligned shapes.
ALIGNMENT = 128
# Documents of up to this share of a part's rows stay whole: as many of them even out, each adds at most
# (part / 4) ** 2 to one part's attention, under 1% of its cost at 16K rows a part.
_WHOLE_SHARE = 4


@overload
def padded_len(num_tokens: int, cp_degree: int, pack_len: int) -> int: ...


@overload
def padded_len(num_tokens: NDArray[np.int64], cp_degree: int, pack_len: int) -> NDArray[np.int64]: ...


def padded_len(num_tokens: Any, cp_degree: int, pack_len: int) -> Any:
    """Round a pack's real tokens up to a multiple of ``lcm(2 * cp_degree, 128)``, at most ``pack_len``.

    Takes one count or an array of them. An empty pack gets one unit of padding, so that its ranks run the same collectives
    as the others.
    """
    unit = math.lcm(2 * cp_degree, ALIGNMENT)
    slots = np.minimum(pack_len, np.maximum(1, -(-num_tokens // unit)) * unit)
    return slots if isinstance(num_tokens, np.ndarray) else int(slots)


@dataclass(frozen=True, kw_only=True, slots=True)
class CpDegrees:
    """How the ranks of a CP group divide attention: by heads (Ulysses) times by queries (all-gathered keys and values).

    The ranks of a CP group are numbered ``gather_rank * ulysses + ulysses_rank``: Ulysses, which moves more, stays between
    neighbours.

    Args:
        ulysses: ranks that divide the heads of one part of the pack.
        gather: parts of the pack, each with its own queries.
    """

    ulysses: int = 1
    gather: int = 1

    @property
    def cp_degree(self) -> int:
        """Ranks that share a pack."""
        return self.ulysses * self.gather


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackPart:
    """One of the parts of a pack: its rows, in runs of consecutive rows of a document, and the keys that each run attends to.

    A run's keys are the rows of its document from the first to the run's last, so that causal attention aligned at the
    bottom right is exact.

    Args:
        rows: ``int64[part_len]``, rows of the pack; those whose keys other parts may need come first.
        query_lens: ``int64[runs]``, rows of each run.
        key_lens: ``int64[runs]``, keys of each run.
        key_rows: ``int64[sum(key_lens)]``, where the keys lie in the first ``gathered_len`` rows of every part, one part after
            the other, followed by all rows of this part; None where the part's own rows are the keys, in order.
        gathered_len: rows whose keys and values each part gives to all others.
    """

    rows: NDArray[np.int64]
    query_lens: NDArray[np.int64]
    key_lens: NDArray[np.int64]
    key_rows: NDArray[np.int64] | None
    gathered_len: int


class _Run(NamedTuple):
    """Consecutive rows ``start .. stop - 1`` of the pack, inside document ``doc``."""

    doc: int
    start: int
    stop: int
    is_cut: bool  # other parts hold rows of this document too


def share_out(doc_lens: Sequence[int], padded: int, num_parts: int) -> list[PackPart]:
    """Share a pack out to parts of equally many rows and near equal attention, moving as few keys as that allows.

    Long documents are cut into two runs a part, one from the head and one from the tail, so that causal attention costs
    every part the same. Short ones stay whole, on the part with the most room; only where none has room is one cut.
    Padding belongs to no document: each part attends to its own.

    Args:
        doc_lens: the documents' tokens, in pack order.
        padded: rows of the pack, a multiple of ``num_parts``.
        num_parts: one for every gather rank.

    Returns:
        The parts by gather rank.
    """
    if num_parts == 1:
        lens = np.array([*doc_lens, padded - sum(doc_lens)], dtype=np.int64)
        lens = lens[lens > 0]  # padding, where there is some, is one more document
        return [PackPart(rows=np.arange(padded), query_lens=lens, key_lens=lens, key_rows=None, gathered_len=0)]
    parts = _assign_runs(doc_lens, padded // num_parts, num_parts)
    gathered_len = max(sum(run.stop - run.start for run in part if run.is_cut) for part in parts)
    doc_starts = np.cumsum([0, *doc_lens])
    rows = [_rows(part) for part in parts]
    held = np.zeros(padded, dtype=np.int64)  # where a row's key lies among the gathered ones
    for index, part_rows in enumerate(rows):
        held[part_rows[:gathered_len]] = index * gathered_len + np.arange(gathered_len)
    return [
        _pack_part(part, part_rows, doc_starts, held, gathered_len, num_parts)
        for part, part_rows in zip(parts, rows, strict=True)
    ]


def local_rows(part: PackPart, ulysses_rank: int, ulysses_degree: int) -> NDArray[np.int64]:
    """Give the pack's rows that one Ulysses rank of a part holds: contiguous in the part, ``int64[local_len]``."""
    local_len = len(part.rows) // ulysses_degree
    return part.rows[ulysses_rank * local_len : (ulysses_rank + 1) * local_len]


def share_of_rank(doc_lens: Sequence[int], padded: int, degrees: CpDegrees, cp_rank: int) -> tuple[PackPart, NDArray[np.int64]]:
    """Give the part of a pack that a rank of its CP group attends with, and the pack's rows that it holds, ``int64[local_len]``.

    Args:
        doc_lens: the documents' tokens, in pack order.
        padded: rows of the pack.
        degrees: how the group's ranks divide attention, and with it how they are numbered.
        cp_rank: of the rank, in its CP group.
    """
    gather_rank, ulysses_rank = divmod(cp_rank, degrees.ulysses)
    part = share_out(doc_lens, padded, degrees.gather)[gather_rank]
    return part, local_rows(part, ulysses_rank, degrees.ulysses)


def _assign_runs(doc_lens: Sequence[int], part_len: int, num_parts: int) -> list[list[_Run]]:
    """Give every part its runs, cut ones first and padding last, ``part_len`` rows in all."""
    starts = np.cumsum([0, *doc_lens]).tolist()
    parts: list[list[_Run]] = [[] for _ in range(num_parts)]
    room = [part_len] * num_parts

    def place(index: int, run: _Run) -> None:
        if run.stop > run.start:
            parts[index].append(run)
            room[index] -= run.stop - run.start

    extra, without_room = 0, []
    for doc in sorted(range(len(doc_lens)), key=lambda doc: -doc_lens[doc]):
        roomiest = room.index(max(room))
        if doc_lens[doc] > part_len // _WHOLE_SHARE:
            for index, start, stop in _head_tail_runs(doc_lens[doc], num_parts, extra):
                place(index, _Run(doc, starts[doc] + start, starts[doc] + stop, is_cut=True))
            extra += doc_lens[doc] % num_parts
        elif room[roomiest] >= doc_lens[doc]:
            place(roomiest, _Run(doc, starts[doc], starts[doc + 1], is_cut=False))
        else:
            without_room.append(doc)
    for doc in without_room:
        start = starts[doc]
        while start < starts[doc + 1]:
            roomiest = room.index(max(room))
            stop = min(starts[doc + 1], start + room[roomiest])
            place(roomiest, _Run(doc, start, stop, is_cut=True))
            start = stop
    padding = starts[-1]
    for index in range(num_parts):
        parts[index].sort(key=lambda run: not run.is_cut)
        stop = padding + room[index]
        place(index, _Run(len(doc_lens), padding, stop, is_cut=False))
        padding = stop
    return parts


def _head_tail_runs(length: int, num_parts: int, extra: int) -> Iterator[tuple[int, int, int]]:
    """Give part, start and stop of each run of a document: heads by part, then tails backwards.

    Rows that do not divide go to the parts from ``extra`` on, in turn: over documents no part gets more than one more.
    """
    more = {(extra + i) % num_parts for i in range(length % num_parts)}
    shares = [length // num_parts + (index in more) for index in range(num_parts)]
    heads = [(index, share - share // 2) for index, share in enumerate(shares)]
    tails = [(index, share // 2) for index, share in reversed(list(enumerate(shares)))]
    # The last part's head and tail meet in the middle: one run.
    middle = (num_parts - 1, shares[-1])
    start = 0
    for index, rows in (*heads[:-1], middle, *tails[1:]):
        yield index, start, start + rows
        start += rows


def _rows(runs: Sequence[_Run]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(run.start, run.stop) for run in runs])


def _pack_part(
    runs: Sequence[_Run],
    rows: NDArray[np.int64],
    doc_starts: NDArray[np.int64],
    held: NDArray[np.int64],
    gathered_len: int,
    num_parts: int,
) -> PackPart:
    query_lens = np.array([run.stop - run.start for run in runs], dtype=np.int64)
    if not gathered_len:
        return PackPart(rows=rows, query_lens=query_lens, key_lens=query_lens, key_rows=None, gathered_len=0)
    # Whole documents and padding are their own keys; they lie behind the gathered rows.
    own = num_parts * gathered_len + np.cumsum(query_lens) - query_lens
    keys = [
        held[doc_starts[run.doc] : run.stop] if run.is_cut else np.arange(start, start + run.stop - run.start)
        for run, start in zip(runs, own, strict=True)
    ]
    return PackPart(
        rows=rows,
        query_lens=query_lens,
        key_lens=np.array([len(part) for part in keys], dtype=np.int64),
        key_rows=np.concatenate(keys),
        gathered_len=gathered_len,
    )
