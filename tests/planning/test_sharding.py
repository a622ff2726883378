import numpy as np
import pytest

from hbp_tune.planning.plans.sharding import CpDegrees, PackPart, local_rows, padded_len, share_out


@pytest.mark.parametrize("seed", range(20))
def test_padded_lengths_are_the_least_that_shards_can_have(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        cp_degree = int(rng.integers(1, 9))
        pack_len = 2 * cp_degree * int(rng.integers(1, 200))
        num_tokens = int(rng.integers(0, pack_len + 1))
        fitting = (n for n in range(1, pack_len) if n >= num_tokens and n % (2 * cp_degree) == 0 and n % 128 == 0)
        want = next(fitting, pack_len)
        assert padded_len(num_tokens, cp_degree, pack_len) == want
        assert padded_len(np.array([num_tokens, 0]), cp_degree, pack_len)[0] == want


def test_padding_by_hand() -> None:
    assert [padded_len(n, 1, 1024) for n in (0, 1, 128, 129, 1000, 1024)] == [128, 128, 128, 256, 1024, 1024]
    assert padded_len(np.array([0, 1, 128, 129, 1000, 1024]), 1, 1024).tolist() == [128, 128, 128, 256, 1024, 1024]
    assert padded_len(1, 96, 19200) == 384  # lcm(2 * 96, 128)
    assert padded_len(33, 1, 48) == 48, "never more than the pack's length"
    assert isinstance(padded_len(1, 96, 19200), int)


def test_one_part_is_the_pack_with_padding_as_one_more_document() -> None:
    (part,) = share_out([5, 3], 12, 1)
    assert (part.rows.tolist(), part.query_lens.tolist(), part.key_lens.tolist()) == (list(range(12)), [5, 3, 4], [5, 3, 4])
    assert part.key_rows is None
    assert share_out([5, 3], 8, 1)[0].query_lens.tolist() == [5, 3]
    assert share_out([], 8, 1)[0].query_lens.tolist() == [8], "an empty pack is all padding"


def test_one_document_by_hand() -> None:
    first, second = share_out([8], 8, 2)
    # A head and a tail, and both runs of the second part meet in the middle.
    assert (first.rows.tolist(), second.rows.tolist()) == ([0, 1, 6, 7], [2, 3, 4, 5])
    assert (first.query_lens.tolist(), first.key_lens.tolist()) == ([2, 2], [2, 8])
    assert (second.query_lens.tolist(), second.key_lens.tolist()) == ([4], [6])
    assert first.gathered_len == second.gathered_len == 4
    # Gathered rows are 0 1 6 7, 2 3 4 5.
    assert first.key_rows is not None
    assert first.key_rows.tolist() == [0, 1, *(0, 1, 4, 5, 6, 7, 2, 3)]
    assert second.key_rows is not None
    assert second.key_rows.tolist() == [0, 1, 4, 5, 6, 7]


def test_short_documents_stay_whole_and_move_nothing() -> None:
    first, second = share_out([2, 2, 1, 1], 16, 2)
    assert (first.rows.tolist(), second.rows.tolist()) == ([0, 1, 4, *range(6, 11)], [2, 3, 5, *range(11, 16)])
    assert (first.query_lens.tolist(), second.query_lens.tolist()) == ([2, 1, 5], [2, 1, 5])
    assert first.key_rows is second.key_rows is None
    assert first.gathered_len == 0


def test_a_short_document_without_room_is_cut() -> None:
    parts = share_out([2] * 18, 36, 4)
    assert [len(part.rows) for part in parts] == [9] * 4
    assert [part.gathered_len for part in parts] == [1] * 4
    assert sum(int((part.query_lens == 2).sum()) for part in parts) == 16, "two of eighteen are cut"


def random_pack(rng: np.random.Generator) -> tuple[list[int], int, int]:
    num_parts = int(rng.integers(2, 9))
    kind = rng.integers(0, 4)
    longest = {0: 3, 1: 40, 2: 400, 3: 2000}[int(kind)]
    doc_lens = [int(n) for n in rng.integers(1, longest + 1, int(rng.integers(0, 30)))]
    padded = padded_len(sum(doc_lens), num_parts, 10**9)
    if rng.random() < 0.5:  # no padding at all
        doc_lens.append(padded - sum(doc_lens) or 1)
        padded = padded_len(sum(doc_lens), num_parts, 10**9)
    return doc_lens, padded, num_parts


def keys_in_pack(parts: list[PackPart], part: PackPart) -> np.ndarray:
    """Translate a part's key rows back to rows of the pack."""
    source = np.concatenate([*(other.rows[: part.gathered_len] for other in parts), part.rows])
    return part.rows if part.key_rows is None else source[part.key_rows]


@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_held_once_and_sees_exactly_its_document_up_to_itself(seed: int) -> None:
    doc_lens, padded, num_parts = random_pack(np.random.default_rng(seed))
    parts = share_out(doc_lens, padded, num_parts)
    assert [len(part.rows) for part in parts] == [padded // num_parts] * num_parts
    assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(padded))
    starts = np.cumsum([0, *doc_lens])
    for part in parts:
        keys = keys_in_pack(parts, part)
        assert part.query_lens.sum() == len(part.rows)
        assert part.key_lens.sum() == len(keys)
        assert (part.query_lens > 0).all()
        for queries, seen in zip(
            np.split(part.rows, np.cumsum(part.query_lens)[:-1]), np.split(keys, np.cumsum(part.key_lens)[:-1]), strict=True
        ):
            # Bottom-right alignment: the last query sees the last key, so the keys must end with the queries themselves.
            assert seen[-len(queries) :].tolist() == queries.tolist() == list(range(queries[0], queries[-1] + 1))
            doc = int(np.searchsorted(starts, queries[0], side="right")) - 1
            if doc < len(doc_lens):
                assert queries[-1] < starts[doc + 1]
                assert seen.tolist() == list(range(starts[doc], queries[-1] + 1))
            else:
                assert seen.tolist() == queries.tolist(), "padding sees its own part's only"


@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_attention_of_long_documents_is_even(num_parts: int) -> None:
    rng = np.random.default_rng(num_parts)
    for _ in range(10):
        doc_lens = [int(n) for n in rng.integers(20_000, 100_000, 3)]
        parts = share_out(doc_lens, padded_len(sum(doc_lens), num_parts, 10**9), num_parts)
        pairs = [float((part.query_lens * (2 * part.key_lens - part.query_lens + 1)).sum()) for part in parts]
        assert max(pairs) < 1.001 * np.mean(pairs)


def test_short_documents_beside_a_long_one_are_not_gathered() -> None:
    doc_lens = [40_000, *[300] * 80]
    parts = share_out(doc_lens, 64_000, 8)
    assert parts[0].gathered_len == 40_000 // 8
    pairs = [float((part.query_lens * (2 * part.key_lens - part.query_lens + 1)).sum()) for part in parts]
    assert max(pairs) < 1.01 * np.mean(pairs)


@pytest.mark.parametrize("ulysses_degree", [1, 2, 4])
def test_ulysses_ranks_hold_contiguous_rows_of_their_part(ulysses_degree: int) -> None:
    for part in share_out([100, 28, 500], 1024, 2):
        rows = [local_rows(part, rank, ulysses_degree) for rank in range(ulysses_degree)]
        assert np.concatenate(rows).tolist() == part.rows.tolist()
        assert len({len(some) for some in rows}) == 1


def test_degrees_multiply() -> None:
    assert CpDegrees(ulysses=4, gather=2).cp_degree == 8
    assert CpDegrees().cp_degree == 1
