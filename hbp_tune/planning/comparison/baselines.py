"""Packers from the literature, to compare with: each as its source says, clear rather than tuned.

None of them drops a sample, although some of their sources do: what is compared is where the same samples go.
"""

import heapq
from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.packing.first_fit import Packer, first_fit
from hbp_tune.planning.plans.hashing import hashed_order


class NoPacking:
    """One sample a pack, in the data set's order: what training without packing does."""

    def place(self, lengths: NDArray[np.int32], pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Give every sample its own pack."""
        return np.arange(len(lengths), dtype=np.int64)


class RandomPacking:
    """Shuffled samples, one after another until the next does not fit: random packing in the HBP paper's comparison."""

    def place(self, lengths: NDArray[np.int32], pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Place by next-fit in an order that each epoch draws anew."""
        order = _shuffled(lengths, seed, epoch)
        return _in_data_order(order, _next_fit(lengths[order], pack_len))


class NextFit:
    """Samples in the data set's order until the next does not fit: torchtune 0.6.1, ``PackedDataset``.

    Its ``split_across_pack=False``: the sample that would overflow a pack begins the next one. The packs are the same in
    every epoch.
    """

    def place(self, lengths: NDArray[np.int32], pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Place by next-fit in the data set's order."""
        return _next_fit(lengths, pack_len)


class LongAlignPacking:
    """Next-fit over samples that were shuffled once, when the data were prepared: LongAlign (Bai et al. 2024, arXiv 2401.18058).

    After ``pre_tokenize.py`` and ``sort_and_group.py`` of THUDM/LongAlign: a pack is closed before a sample that would
    bring it to its full length, so that at least one token stays free, and every epoch repeats the same packs. The
    original drops samples of full length and the last pack; here each of the former has a pack of its own.
    """

    def place(self, lengths: NDArray[np.int32], pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Place by next-fit in one order for all epochs, leaving at least a token of each shared pack free."""
        order = _shuffled(lengths, seed, 0)
        return _in_data_order(order, _next_fit(lengths[order], pack_len - 1))


class ISF:
    """Iterative sampling and filtering: OmniBal (Yao et al. 2024, arXiv 2407.20761), the naive packing of the HBP paper.

    Each round shuffles what is left and packs it by next-fit; packs that are full enough stay, the samples of the others
    go into the next round. The last round keeps all its packs.

    Args:
        full_ratio: share of a pack's tokens from which on it counts as full; the authors' code has 4,050 of 4,096.
        rounds: how many rounds to pack; the authors' code has 10.

    Raises:
        ConfigError: ``full_ratio`` is outside (0, 1] or ``rounds`` is below 1.
    """

    def __init__(self, full_ratio: float = 4050 / 4096, rounds: int = 10) -> None:
        if not 0 < full_ratio <= 1:
            raise ConfigError(f"full_ratio={full_ratio} must be above 0 and at most 1; 0.99 is usual")
        if rounds < 1:
            raise ConfigError(f"rounds={rounds} must be at least 1; 10 is usual")
        self.full_ratio = full_ratio
        self.rounds = rounds

    def place(self, lengths: NDArray[np.int32], pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Number the packs in the order in which the rounds kept them."""
        place = np.empty(len(lengths), dtype=np.int64)
        left = np.arange(len(lengths))
        num_packs = 0
        for index in range(self.rounds):
            left = left[hashed_order(len(left), seed=seed, epoch=epoch, stream=f"baseline ISF {index}")]
            packs = _next_fit(lengths[left], pack_len)
            is_kept = np.bincount(packs, weights=lengths[left]) >= self.full_ratio * pack_len
            if index == self.rounds - 1:
                is_kept[:] = True
            number = num_packs + np.cumsum(is_kept) - 1
            placed = is_kept[packs]
            place[left[placed]] = number[packs[placed]]
            num_packs += int(np.count_nonzero(is_kept))
            left = left[~placed]
        return place


class FirstFitShuffle:
    """Shuffled samples, each into the first pack with room: FFS in the HBP paper's comparison."""

    def place(self, lengths: NDArray[np.int32], pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Place by first-fit in an order that each epoch draws anew."""
        order = _shuffled(lengths, seed, epoch)
        return _in_data_order(order, first_fit(lengths[order], pack_len))


class FirstFitDecreasing:
    """Samples from long to short, each into the first pack with room: Johnson 1973; FFD in the HBP paper's comparison."""

    def place(self, lengths: NDArray[np.int32], pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Place by first-fit; of samples of one length the lower id comes first."""
        order = _decreasing(lengths)
        return _in_data_order(order, first_fit(lengths[order], pack_len))


class BestFitShuffle:
    """Shuffled samples, each into the fullest pack with room: BFS in the HBP paper's comparison."""

    def place(self, lengths: NDArray[np.int32], pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Place by best-fit in an order that each epoch draws anew."""
        order = _shuffled(lengths, seed, epoch)
        return _in_data_order(order, _best_fit(lengths[order], pack_len))


class BestFitDecreasing:
    """Samples from long to short, each into the fullest pack with room: Johnson 1973."""

    def place(self, lengths: NDArray[np.int32], pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Place by best-fit; of samples of one length the lower id comes first."""
        order = _decreasing(lengths)
        return _in_data_order(order, _best_fit(lengths[order], pack_len))


class SPFHP:
    """Shortest-pack-first histogram packing (Krell et al. 2021, arXiv 2107.02027): long to short, into the emptiest pack.

    Without a limit on the samples of a pack. Where a length fits nowhere, the authors' code opens a pack for each remaining
    sample of that length. That suits their packs of a few samples, but leaves 10% of 128K packs of Tulu 3 and LongCite empty,
    where the HBP paper reports 1%; so here one pack is opened at a time.
    """

    def place(self, lengths: NDArray[np.int32], pack_len: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Place by worst-fit; of samples of one length the lower id comes first."""
        order = _decreasing(lengths)
        return _in_data_order(order, _worst_fit(lengths[order], pack_len))


BASELINES: dict[str, type[Packer]] = {
    "none": NoPacking,
    "random": RandomPacking,
    "next_fit": NextFit,
    "isf": ISF,
    "first_fit_shuffle": FirstFitShuffle,
    "first_fit_decreasing": FirstFitDecreasing,
    "best_fit_shuffle": BestFitShuffle,
    "best_fit_decreasing": BestFitDecreasing,
    "spfhp": SPFHP,
    "longalign_packing": LongAlignPacking,
}


def _shuffled(lengths: NDArray[np.int32], seed: int, epoch: int) -> NDArray[np.int64]:
    return hashed_order(len(lengths), seed=seed, epoch=epoch, stream="baseline")


def _decreasing(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.argsort(-lengths, kind="stable")


def _in_data_order(order: NDArray[np.int64], packs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Turn the packs of samples in ``order`` into the packs of samples by id."""
    place = np.empty_like(packs)
    place[order] = packs
    return place


def _next_fit(lengths: NDArray[np.int32], pack_len: int) -> NDArray[np.int64]:
    """Fill one pack after another; a sample that does not fit begins the next, also where it fits into none."""
    place = []
    pack, tokens = -1, pack_len
    for length in lengths.tolist():
        tokens += length
        if tokens > pack_len:
            pack, tokens = pack + 1, length
        place.append(pack)
    return np.array(place, dtype=np.int64)


def _best_fit(lengths: NDArray[np.int32], pack_len: int) -> NDArray[np.int64]:
    """Place each sample into the pack that it leaves the least room in; of equal packs into the one opened first."""
    place = []
    num_packs = 0
    shortest = int(lengths.min(initial=pack_len))
    open_packs: list[tuple[int, int]] = []  # (room, pack), ascending; a pack without room for the shortest sample is left out
    for length in lengths.tolist():
        if (at := bisect_left(open_packs, (length, 0))) < len(open_packs):
            room, pack = open_packs.pop(at)
        else:
            room, pack = pack_len, num_packs
            num_packs += 1
        if room - length >= shortest:
            insort(open_packs, (room - length, pack))
        place.append(pack)
    return np.array(place, dtype=np.int64)


def _worst_fit(lengths: NDArray[np.int32], pack_len: int) -> NDArray[np.int64]:
    """Place each sample into the pack with the most room; of equal packs into the one opened first."""
    place = []
    packs: list[tuple[int, int]] = []  # (-room, pack), a heap: the emptiest pack comes first
    for length in lengths.tolist():
        if packs and -packs[0][0] >= length:
            room, pack = -packs[0][0], packs[0][1]
            heapq.heapreplace(packs, (length - room, pack))
        else:
            pack = len(packs)
            heapq.heappush(packs, (length - pack_len, pack))
        place.append(pack)
    return np.array(place, dtype=np.int64)
