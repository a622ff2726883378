import warnings
from dataclasses import replace

import numpy as np
import pytest

from hbp_tune.errors import ConfigError
from hbp_tune.planning.packing.curriculum import Curriculum, Interleave, LinearRamp, StepLimit, StepProfile
from hbp_tune.planning.packing.stages import ShortFirst, Staged

PACK_LENS = np.array([64, 128, 256])


def profile(step_groups: list[int], longest: list[int] | None = None) -> StepProfile:
    """Give steps by the index of their group; by default the longest document fills its pack."""
    pack_lens = PACK_LENS[np.array(step_groups, dtype=np.int64)]
    return StepProfile(pack_lens, (pack_lens if longest is None else np.array(longest)).astype(np.int32))


def order(curriculum: Curriculum, step_groups: list[int], first_step: int = 0, *, epoch: int = 0, seed: int = 0) -> list[int]:
    return curriculum.order(profile(step_groups), first_step=first_step, epoch=epoch, seed=seed).tolist()


def trained(curriculum: Curriculum, step_groups: list[int], first_step: int = 0) -> list[int]:
    """Give the groups in the order in which they are trained."""
    return [step_groups[i] for i in order(curriculum, step_groups, first_step)]


# What holds for all


@pytest.mark.parametrize("seed", range(20))
def test_orders_are_permutations_that_arguments_alone_decide(seed: int) -> None:
    rng = np.random.default_rng(seed)
    step_groups = np.sort(rng.integers(0, 3, rng.integers(1, 200)))
    step_groups -= step_groups[0]
    steps = profile(step_groups.tolist(), rng.integers(1, 65, len(step_groups)).tolist())
    num_steps, max_len = int(rng.integers(1, 40)), int(np.median(steps.longest))
    num_short = min(num_steps, np.count_nonzero(steps.pack_lens == 64) - 1, np.count_nonzero(steps.longest <= max_len) - 1)
    num_short = max(int(num_short), 0)
    curricula: list[Curriculum] = [
        Interleave(),
        Interleave("random"),
        ShortFirst(num_short),
        ShortFirst(num_short, max_pack_len=128, spacing="random"),
        ShortFirst(num_short, max_len=max_len),
        ShortFirst(0.05),
        ShortFirst(0.5, max_len=max_len),
        Staged([{"steps": 0.1, "max_pack_len": 64}, {"steps": 0.2, "max_pack_len": 128}]),
        LinearRamp(0.2),
        Staged([{"steps": num_steps, "max_pack_len": 64}, {"steps": 5, "max_pack_len": 128}]),
        Staged([{"steps": num_steps, "max_len": max_len}, {"steps": 30, "max_len": max_len + 5}], spacing="random"),
        LinearRamp(num_steps),
        LinearRamp(10 * num_steps, start=0.3),
        LinearRamp(num_steps, start=0.1, max_len=max_len),
    ]
    for curriculum in curricula:
        for first_step in (0, num_steps // 2, num_steps, 10_000):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got, again = (curriculum.order(steps, first_step=first_step, epoch=1, seed=seed) for _ in range(2))
            assert sorted(got.tolist()) == list(range(len(steps)))
            assert got.tolist() == again.tolist(), "no state between calls"


# Interleave


def test_interleave_by_hand() -> None:
    assert trained(Interleave(), [0, 0, 0, 2]) == [0, 0, 2, 0]
    assert [i for i in order(Interleave(), [0, 0, 0, 2]) if i < 3] == [0, 1, 2], "steps of a group keep their order"
    assert order(Interleave(), [0, 0, 0, 0, 2, 2]) == [0, 4, 1, 2, 5, 3]
    assert order(Interleave(), [2]) == [0]
    assert order(Interleave(), [0, 1, 2]) == [0, 1, 2], "the shorter group goes first"


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_spread_in_proportion(seed: int) -> None:
    rng = np.random.default_rng(seed)
    step_groups = np.sort(rng.integers(0, 3, rng.integers(1, 200))).tolist()
    groups = np.array(trained(Interleave(), step_groups))
    for group in set(step_groups):
        share = (groups == group).mean()
        counts = np.cumsum(groups == group)
        assert np.abs(counts - share * np.arange(1, len(groups) + 1)).max() <= 2, "never far from its share"


def test_random_spacing_is_decided_by_seed_and_epoch() -> None:
    step_groups = [0] * 60 + [2] * 20
    orders = {tuple(order(Interleave("random"), step_groups, epoch=epoch, seed=seed)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    # In proportion at random: of 400 halves, those with a fourth of long steps are the most.
    long_in_half = [sum(i >= 60 for i in order(Interleave("random"), step_groups, seed=seed)[:40]) for seed in range(400)]
    assert 9.7 < np.mean(long_in_half) < 10.3
    assert 1.9 < np.std(long_in_half) < 2.6, "hypergeometric: 2.25"


def test_another_spacing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"curriculum.spacing='odd' must be one of even, random"):
        Interleave("odd")


# ShortFirst


def test_short_first_then_the_rest_in_proportion() -> None:
    assert trained(ShortFirst(steps=3), [0] * 6 + [2] * 3) == [0, 0, 0, 0, 2, 0, 2, 0, 2]
    step_groups = [0, 0, 0, 0, 2, 2]
    assert order(ShortFirst(steps=0), step_groups) == [0, 4, 1, 2, 5, 3]
    assert order(ShortFirst(steps=2), step_groups) == [0, 1, 2, 4, 3, 5]
    assert order(ShortFirst(steps=5), step_groups, first_step=4) == [0, 1, 4, 2, 5, 3], "one of five is left"


def test_steps_count_over_the_run() -> None:
    step_groups = [0] * 6 + [2] * 6
    later = trained(ShortFirst(steps=10), step_groups, first_step=7)
    assert later[:3] == [0, 0, 0]
    assert 2 in later[3:5]
    for spacing in ("even", "random"):
        steady = order(Interleave(spacing), step_groups, first_step=10)
        assert order(ShortFirst(steps=10, spacing=spacing), step_groups, first_step=10) == steady


def test_all_groups_up_to_the_limit_are_short() -> None:
    assert set(trained(ShortFirst(steps=6, max_pack_len=128), [0] * 4 + [1] * 4 + [2] * 4)[:6]) == {0, 1}


def test_the_short_steps_are_mixed_at_random_on_request() -> None:
    step_groups = [0] * 30 + [1] * 30 + [2] * 30
    curriculum = ShortFirst(steps=40, max_pack_len=128, spacing="random")
    first = [step_groups[i] for i in order(curriculum, step_groups)][:40]
    assert set(first) == {0, 1}
    assert first != trained(ShortFirst(steps=40, max_pack_len=128), step_groups)[:40]
    # What the first stage left is mixed anew: its long steps do not come first.
    rests = np.array([trained_by(curriculum, step_groups, seed)[40:] for seed in range(200)])
    assert 0.5 < (rests[:, :10] == 2).mean() < 0.7, "30 of 50 are long"


def trained_by(curriculum: Curriculum, step_groups: list[int], seed: int) -> list[int]:
    return [step_groups[i] for i in order(curriculum, step_groups, seed=seed)]


def test_documents_decide_within_one_pack_length() -> None:
    steps = profile([2] * 6, longest=[200, 30, 256, 31, 90, 12])
    assert ShortFirst(steps=3, max_len=90).order(steps, first_step=0, epoch=0, seed=0).tolist() == [1, 3, 4, 0, 2, 5]
    assert ShortFirst(steps=2, max_len=31).order(steps, first_step=0, epoch=0, seed=0).tolist() == [1, 3, 0, 2, 4, 5]


@pytest.mark.parametrize(("steps", "first_step", "bound"), [(9, 0, 6), (6, 0, 6), (9, 3, 9)])
def test_an_epoch_is_never_sorted(steps: int, first_step: int, bound: int) -> None:
    told = (
        rf"curriculum.steps={steps} would train all 6 short steps of epoch 0 before its 6 others, and mix none: 2 of them come "
        rf"first, a third; give a share of the run, such as steps=0.05, or a number below {bound}"
    )
    with pytest.warns(UserWarning, match=told):
        got = trained(ShortFirst(steps=steps), [0] * 6 + [2] * 6, first_step)
    assert got[:2] == [0, 0]
    assert 2 in got[2:5]


def test_nothing_is_capped_where_all_steps_are_short() -> None:
    assert order(ShortFirst(steps=9, max_pack_len=256), [0, 0, 2]) == [0, 2, 1]


def in_run(curriculum: Curriculum, run_steps: int, first_step: int = 0) -> int:
    """Count the short steps that 30 short and 40 long ones begin with."""
    steps = replace(profile([0] * 30 + [2] * 40), run_steps=run_steps)
    got = curriculum.order(steps, first_step=first_step, epoch=0, seed=0)
    return int(np.argmax(got >= 30))


def test_a_share_of_the_run() -> None:
    mixed_from = in_run(ShortFirst(0), 70)
    for run_steps, first_step, num_short in ((70, 0, 7), (140, 0, 10), (140, 10, 4), (140, 70, 0), (7000, 0, 10), (20, 0, 2)):
        # So many short ones, and then a mixture, which itself may begin with a short one.
        assert num_short <= in_run(ShortFirst(0.1), run_steps, first_step) <= num_short + mixed_from + 1, run_steps
    assert in_run(ShortFirst(0.1), 70) == in_run(ShortFirst(7), 1)
    assert in_run(ShortFirst(0.1), 7000) == in_run(ShortFirst(10), 1), "at most a third of the epoch's short steps"


def test_without_a_run_the_epoch_is_it() -> None:
    step_groups = [0] * 30 + [2] * 40
    assert order(ShortFirst(0.1), step_groups) == order(ShortFirst(7), step_groups)
    assert order(LinearRamp(0.5), step_groups) == order(LinearRamp(35), step_groups)
    by_share = Staged([{"steps": 0.1, "max_pack_len": 64}, {"steps": 0.2, "max_pack_len": 128}])
    by_number = Staged([{"steps": 7, "max_pack_len": 64}, {"steps": 14, "max_pack_len": 128}])
    assert order(by_share, step_groups) == order(by_number, step_groups)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, r"curriculum.steps=-1 must be a whole number of at least 0"),
        ({"steps": 1.5}, r"curriculum.steps=1.5 must be a whole number of at least 0, or a share of the run between 0 and 1"),
        ({"steps": 0.0}, r"curriculum.steps=0.0 must be a whole number of at least 0, or a share"),
        ({"steps": True}, r"curriculum.steps=True must be a whole number"),
        ({"steps": 1, "max_len": 0}, r"curriculum.max_len=0 must be a whole number of at least 1"),
        ({"steps": 1, "max_pack_len": "16K"}, r"curriculum.max_pack_len='16K' must be a whole number"),
        ({"steps": 1, "max_pack_len": 64, "max_len": 32}, r"curriculum: max_pack_len=64 and max_len=32 both say .* give one"),
        ({"steps": 1, "spacing": "odd"}, r"curriculum.spacing='odd'"),
    ],
)
def test_short_first_that_cannot_work(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShortFirst(**arguments)


def test_a_limit_below_every_step_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"curriculum.max_pack_len=32 is shorter than every group; the shortest has pack_len=64"
    ):
        order(ShortFirst(steps=1, max_pack_len=32), [0])
    with pytest.raises(
        ConfigError, match=r"curriculum.max_len=32 leaves no step: each has a document of 64 tokens or more; raise"
    ):
        order(ShortFirst(steps=1, max_len=32), [0, 1])


# Staged

THREE = [0] * 6 + [1] * 6 + [2] * 6
TWO_STAGES = Staged([{"steps": 4, "max_pack_len": 64}, {"steps": 3, "max_pack_len": 128}])


def test_stages_by_hand() -> None:
    groups = trained(TWO_STAGES, THREE)
    assert groups[:4] == [0] * 4
    assert groups[4:7] == [1, 0, 1], "six middle steps and two short ones, in proportion"
    assert sorted(groups[7:]) == [0, 1, 1, 1, 1, *[2] * 6]
    assert groups[7:] == trained(Interleave(), [0] + [1] * 4 + [2] * 6)


@pytest.mark.parametrize(("first_step", "want"), [(2, [2, 3]), (4, [0, 3]), (5, [0, 2]), (7, [0, 0]), (50, [0, 0])])
def test_a_later_epoch_takes_the_stages_up_where_the_run_is(first_step: int, want: list[int]) -> None:
    groups = trained(TWO_STAGES, THREE, first_step)
    only_short, no_long = want
    assert groups[:only_short] == [0] * only_short
    assert 2 not in groups[: only_short + no_long]
    if not sum(want):
        assert groups == trained(Interleave(), THREE)


def test_a_stage_that_runs_out_gives_way_to_the_next() -> None:
    stages = Staged([{"steps": 4, "max_pack_len": 64}, {"steps": 3, "max_pack_len": 128}])
    with pytest.warns(UserWarning, match=r"curriculum.stages\[0\].steps=4 asks for 4 short steps in this epoch, which has 2"):
        groups = trained(stages, [0] * 2 + [1] * 6 + [2] * 2)
    assert groups[:7] == [0, 0, 1, 1, 1, 1, 1], "up to step 7 of the run"
    with pytest.warns(UserWarning, match=r"curriculum.stages\[1\].steps=3 asks for 3 short steps in this epoch, which has 1"):
        assert trained(stages, [0] * 5 + [2] * 4)[:5] == [0] * 5


def test_one_stage_is_short_first() -> None:
    for first_step in (0, 2, 9):
        one = order(Staged([{"steps": 5, "max_pack_len": 128}]), THREE, first_step)
        assert one == order(ShortFirst(5, max_pack_len=128), THREE, first_step)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"curriculum.stages is empty; give at least one, with steps and max_pack_len or max_len"),
        ([{"steps": 4}], r"curriculum.stages\[0\]=\{'steps': 4\} must have steps and either max_pack_len or max_len"),
        ([{"max_len": 4}], r"curriculum.stages\[0\]=.* must have steps and either"),
        ([{"steps": 4, "max_len": 4, "max_pack_len": 4}], r"curriculum.stages\[0\]=.* must have steps and either"),
        ([{"steps": 4, "max_len": 4, "min_len": 2}], r"curriculum.stages\[0\]=.* and nothing else"),
        (["short"], r"curriculum.stages\[0\]=short must have steps"),
        ([{"steps": 0, "max_len": 4}], r"curriculum.stages\[0\].steps=0 must be a whole number of at least 1"),
        ([{"steps": 1, "max_len": 0}], r"curriculum.stages\[0\].max_len=0 must be a whole number of at least 1"),
        (
            [{"steps": 1, "max_len": 8}, {"steps": 1, "max_len": 8}],
            r"curriculum.stages\[1\].max_len=8 must be more than 8 of the stage before it",
        ),
        (
            [{"steps": 1, "max_len": 8}, {"steps": 1, "max_pack_len": 64}],
            r"curriculum.stages\[1\] has max_pack_len, the stage before it the other limit; give all stages the same one",
        ),
    ],
)
def test_stages_that_cannot_work(stages: list[dict[str, int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Staged(stages)


# LinearRamp


def test_a_ramp_by_hand() -> None:
    # Densities 1, 3, 5, 7, 8, 8, 8, 8 over 16: scaled to 4 long steps they add up to 1/12, 4/12, 9/12, 16/12, 2, 2.67, 3.33, 4.
    assert trained(LinearRamp(4), [0] * 4 + [2] * 4) == [0, 0, 2, 0, 2, 2, 0, 2]
    assert order(LinearRamp(4), [0] * 4 + [2] * 4) == [0, 1, 4, 2, 5, 6, 3, 7], "steps of a group keep their order"


def test_the_density_of_long_steps_rises_linearly_then_stays() -> None:
    groups = np.array(trained(LinearRamp(1000, start=0.2), [0] * 1800 + [2] * 200))
    is_long = (groups == 2).reshape(10, 200).sum(axis=1)
    density = np.minimum(0.2 + 0.8 * (np.arange(10) + 0.5) / 5, 1.0)
    want = 200 * density / density.sum()
    assert np.abs(is_long - want).max() <= 1
    assert np.abs(np.cumsum(is_long) - np.cumsum(want)).max() <= 1


def test_a_ramp_goes_on_in_the_next_epoch() -> None:
    step_groups = [0] * 180 + [2] * 20
    first, second, third = (np.array(trained(LinearRamp(400), step_groups, first_step)) == 2 for first_step in (0, 200, 400))
    assert first[:100].sum() == 5, "a fourth of the density's area lies in the first half"
    assert second[:100].sum() == 8, "5/12 of it: from 1/2 to 3/4, then to 1"
    assert third[:100].sum() == 10
    assert trained(LinearRamp(400), step_groups, first_step=400) == trained(Interleave(), step_groups)


def test_no_long_step_is_lost_where_the_ramp_wants_more_than_all() -> None:
    groups = np.array(trained(LinearRamp(100), [0] * 20 + [2] * 80))
    assert (groups == 2).sum() == 80
    assert (groups[-60:] == 2).all(), "the rest of the epoch is long"
    early = np.cumsum(groups[:40] == 2)
    want = np.cumsum(np.arange(40) + 0.5) / 40  # density 1 from step 40 on
    assert np.abs(early - want).max() <= 1


@pytest.mark.parametrize("step_groups", [[2], [0, 0], [0, 2], [0, 2, 2, 2, 2]], ids=str)
def test_ramps_over_few_steps(step_groups: list[int]) -> None:
    assert sorted(order(LinearRamp(3), step_groups)) == list(range(len(step_groups)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"curriculum.steps=0 must be a whole number of at least 1"),
        ({"steps": 5, "start": 1.5}, r"curriculum.start=1.5 must be 0 to 1: the first density of long steps over the steady one"),
        ({"steps": 5, "start": -0.1}, r"curriculum.start=-0.1 must be 0 to 1"),
        ({"steps": 5, "max_pack_len": 64, "max_len": 32}, r"max_pack_len=64 and max_len=32 both say"),
    ],
)
def test_a_ramp_that_cannot_work(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinearRamp(**arguments)


def test_limits_by_hand() -> None:
    steps = profile([0, 1, 2, 1], longest=[64, 70, 90, 128])
    assert StepLimit("key", None, None).is_short(steps).tolist() == [True, False, False, False]
    assert StepLimit("key", 128, None).is_short(steps).tolist() == [True, True, False, True]
    assert StepLimit("key", None, 90).is_short(steps).tolist() == [True, True, True, False]
