import numpy as np
import pytest
from numpy.typing import NDArray

from hbp_tune.planning.packing.lpt import lpt


def place(lengths: list[int] | NDArray[np.int64], num_packs: int, pack_len: int, double_len: int = 0) -> list[int]:
    """Place documents; all find room."""
    dealt = np.full(len(lengths), -7, dtype=np.int64)
    assert lpt(np.asarray(lengths, dtype=np.int64), double_len, num_packs, pack_len, dealt)
    return dealt.tolist()


def slow_lpt(lengths: list[int], double_len: int, num_packs: int, pack_len: int) -> list[int]:
    """Say plainly what LPT under a token cap means."""
    load, room, dealt = [0] * num_packs, [pack_len] * num_packs, []
    for length in lengths:
        having_room = [pack for pack in range(num_packs) if room[pack] >= length]
        pack = min(having_room, key=lambda pack: (load[pack], pack), default=-1)
        if pack >= 0:
            load[pack] += length * (length + double_len)
            room[pack] -= length
        dealt.append(pack)
    return dealt


def test_the_cheapest_pack_is_next_by_hand() -> None:
    # 5 | 4 | 3: 25, 16, 9. Then 3 joins 3 (18 > 16), and 2 joins 4.
    assert place([5, 4, 3, 3, 2], 3, 100) == [0, 1, 2, 2, 1]
    # The linear part counts too: 3 * 103 + 2 * 102 > 4 * 104, so that the 1 joins the 4.
    assert place([4, 3, 2, 1], 2, 100, double_len=100) == [0, 1, 1, 0]
    assert place([4, 3, 2, 1], 2, 100) == [0, 1, 1, 1]


def test_the_lower_pack_wins_a_tie() -> None:
    assert place([2, 2, 2, 2, 2], 3, 10) == [0, 1, 2, 0, 1]


def test_a_full_pack_is_passed_over() -> None:
    # 6 | 3 3 1: the last 1 would join these by cost, but their pack is full.
    assert place([6, 3, 3, 1, 1], 2, 7) == [0, 1, 1, 1, 0]
    assert place([5], 1, 5) == [0], "a pack may be full to the last token"


def test_no_document_and_more_packs_than_documents() -> None:
    assert place([], 3, 5) == []
    assert place([5, 5], 4, 5) == [0, 1]


def test_a_document_without_room_is_noticed() -> None:
    # 4 | 3: the next 3 finds room of 1 and 2.
    assert not lpt(np.array([4, 3, 3, 1]), 0, 2, 5, np.empty(4, dtype=np.int64))


def draw(seed: int) -> tuple[list[int], int, int]:
    """Draw documents, and packs that hold them in about every other case."""
    rng = np.random.default_rng(seed)
    pack_len = int(rng.integers(1, 200))
    lengths = np.sort(rng.integers(1, rng.integers(1, pack_len + 1) + 1, rng.integers(0, 300)))[::-1]
    return lengths.tolist(), 1 + int(lengths.sum() / pack_len * rng.uniform(0.9, 1.3)), pack_len


@pytest.mark.parametrize("double_len", [0, 7, 41_516])
@pytest.mark.parametrize("seed", range(20))
def test_lpt_equals_the_plain_loop(seed: int, double_len: int) -> None:
    lengths, num_packs, pack_len = draw(seed)
    dealt = np.empty(len(lengths), dtype=np.int64)
    fits = lpt(np.array(lengths, dtype=np.int64), double_len, num_packs, pack_len, dealt)
    want = slow_lpt(lengths, double_len, num_packs, pack_len)
    assert fits == (-1 not in want)
    if fits:
        assert dealt.tolist() == want


def test_the_plain_loop_sees_documents_with_and_without_room() -> None:
    assert (
        5 <= sum(-1 in slow_lpt(lengths, 7, num_packs, pack_len) for lengths, num_packs, pack_len in map(draw, range(20))) <= 15
    )


def test_costs_of_a_million_tokens_do_not_overflow() -> None:
    # 4096 packs of 2**20 tokens: a key is up to 2**40 * 2**12.
    dealt = place(np.full(8192, 2**19), 4096, 2**20, double_len=41_516)
    assert np.array_equal(dealt, np.tile(np.arange(4096), 2))
