import numpy as np
import pytest

from hbp_tune.errors import PackingError
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.planning.plans.truncation import CUTS, cut_of, kept_tokens

KEPT = 16


def mask(*runs: int) -> np.ndarray:
    """Make targets of runs of tokens: first some that are none, then some that are, and so on."""
    return np.concatenate([np.full(length, index % 2 == 1) for index, length in enumerate(runs)])


def gaps(kept: np.ndarray) -> list[tuple[int, int]]:
    """Give what was taken out, as first token and number."""
    edges = np.flatnonzero(np.diff(kept) > 1)
    return [(int(kept[i]) + 1, int(kept[i + 1] - kept[i] - 1)) for i in edges]


def test_the_middle_of_the_document_goes() -> None:
    kept = kept_tokens(mask(100, 20), 90, "truncate_middle")
    assert gaps(kept) == [(35, 30)]  # 35 tokens before it and 35 behind
    assert kept[-1] == 119


def test_the_longest_run_goes_first_then_the_next() -> None:
    kept = kept_tokens(mask(60, 5, 100, 5), 80, "truncate_middle")
    assert gaps(kept) == [(19, 22), (65 + 16, 68)]  # all that the long run can give, and 22 of the other
    assert mask(60, 5, 100, 5)[kept].sum() == 10
    of_equals = kept_tokens(mask(50, 5, 50, 5), 100, "truncate_middle")
    assert gaps(of_equals) == [(20, 10)]


def test_the_beginning_of_the_prompt_goes_but_its_first_token() -> None:
    assert gaps(kept_tokens(mask(100, 20), 90, "truncate_start")) == [(1, 30)]
    kept = kept_tokens(mask(30, 20), 30, "truncate_start")
    assert kept.tolist() == [0, *range(14, 43)]  # 13 of the prompt, then the answer's end


def test_the_end_goes() -> None:
    assert kept_tokens(mask(100, 20), 90, "truncate_end").tolist() == list(range(90))


def test_an_answer_that_is_too_long_loses_its_end() -> None:
    kept = kept_tokens(mask(20, 100), 50, "truncate_middle")
    assert kept.tolist() == list(range(50))
    kept = kept_tokens(mask(40, 100), 50, "truncate_middle")
    assert gaps(kept) == [(16, 8)]
    assert kept[-1] == 57


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("seed", range(20))
def test_so_many_tokens_stay_in_their_order_and_targets_wherever_others_can_give_way(cut: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    is_target = mask(*random.integers(1, 120, size=random.integers(1, 8)))
    max_len = int(random.integers(1, len(is_target))) if len(is_target) > 1 else 1
    if max_len == len(is_target):
        return
    kept = kept_tokens(is_target, max_len, cut)
    assert len(kept) == max_len
    assert (np.diff(kept) > 0).all()
    runs = np.split(is_target, np.flatnonzero(np.diff(is_target)) + 1)
    can_give = sum(max(0, len(run) - 2 * KEPT) for run in runs if not run[0])
    if cut == "truncate_middle" and can_give >= len(is_target) - max_len:
        assert is_target[kept].sum() == is_target.sum()


def one_by_one(is_target: np.ndarray, max_len: int, cut: str) -> list[int]:
    """Take tokens out one after the other: those next to the middle of a run first, or those behind the first token."""
    runs = [list(run) for run in np.split(np.arange(len(is_target)), np.flatnonzero(np.diff(is_target)) + 1)]
    masked = [run for run in runs if not is_target[run[0]]]
    if cut == "truncate_middle":
        shrinking, at, fewest = sorted(masked, key=len, reverse=True), lambda run: len(run) // 2, 2 * KEPT
    else:
        shrinking, at, fewest = [run for run in masked if run[0] == 0], lambda run: 1, 1 + KEPT
    for run in shrinking if cut != "truncate_end" else []:
        while sum(map(len, runs)) > max_len and len(run) > fewest:
            del run[at(run)]
    return [int(i) for run in runs for i in run][:max_len]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("seed", range(50))
def test_the_tokens_that_stay_are_those_of_taking_one_by_one(cut: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, random.choice([20, 60, 120]), size=random.integers(2, 9))
    is_target = mask(*([0] if seed % 2 else []), *lengths)  # every second sample begins with a target
    max_len = int(random.integers(1, len(is_target)))
    assert kept_tokens(is_target, max_len, cut).tolist() == one_by_one(is_target, max_len, cut)


def test_policies_name_a_cut() -> None:
    assert [cut_of(name) for name in ("truncate", "truncate_start", "drop")] == [
        "truncate_middle",
        "truncate_start",
        "truncate_middle",
    ]


@pytest.mark.parametrize("mode", ["cost", "paper"])
def test_a_sample_without_a_target_left_is_dropped_and_no_plan_fails_for_it(mode: str) -> None:
    lengths = np.array([300, 50, 400], dtype=np.int32)
    groups = [PackingGroup(name="all", pack_len=256)]
    plan = BalancePlanner(overlong="truncate_end", mode=mode).plan(
        lengths, np.array([0, 10, 7], dtype=np.int32), groups, world_size=1, seed=0
    )
    assert (plan.dropped.tolist(), plan.truncated.tolist(), plan.cut) == ([0], [2], "truncate_end")
    assert sorted(plan.sample_ids.tolist()) == [1, 2]
    assert sorted(plan.lengths.tolist()) == [50, 256]
    with pytest.raises(PackingError, match=r"overlong=truncate leaves no sample: 2 of 2 samples .* no target of theirs fits"):
        BalancePlanner(overlong="truncate", mode=mode).plan(
            lengths[[0, 2]], np.zeros(2, dtype=np.int32), groups, world_size=1, seed=0
        )


def test_how_samples_are_cut_decides_what_is_trained() -> None:
    lengths = np.array([300, 50], dtype=np.int32)

    def plan_hash(overlong: str, longest: int) -> str:
        groups = [PackingGroup(name="all", pack_len=longest)]
        return BalancePlanner(overlong=overlong).plan(lengths, lengths, groups, world_size=1, seed=0).hash

    assert len({plan_hash(cut, 256) for cut in CUTS}) == 3
    assert len({plan_hash(cut, 512) for cut in (*CUTS, "error", "drop")}) == 1
