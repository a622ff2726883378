import numpy as np
import pytest

from hbp_tune.errors import ConfigError
from hbp_tune.planning.plans.draw import draw_samples

SOURCES = np.repeat(np.arange(3, dtype=np.int16), [10, 4, 100])


def counts(weights: list[float], *, seed: int = 0, epoch: int = 0) -> list[np.ndarray]:
    """Count how often each sample is drawn, by data set."""
    drawn = draw_samples(SOURCES, weights, seed=seed, epoch=epoch)
    assert drawn.dtype == np.int32
    assert (np.diff(drawn) >= 0).all()
    return np.split(np.bincount(drawn, minlength=len(SOURCES)), [10, 14])


def test_every_sample_once_by_default() -> None:
    assert draw_samples(SOURCES, [1, 1.0, 1], seed=3, epoch=2).tolist() == list(range(114))


def test_how_many_is_exact() -> None:
    first, second, third = counts([0.3, 2.0, 1.25])
    assert sorted(first.tolist()) == [0] * 7 + [1] * 3
    assert second.tolist() == [2] * 4
    assert sorted(third.tolist()) == [1] * 75 + [2] * 25


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.99, 1.1, 3.7])
def test_how_many_is_exact_for_any_weight(weight: float) -> None:
    assert [part.sum() for part in counts([weight, 1, weight])] == [round(10 * weight), 4, round(100 * weight)]


def test_which_is_drawn_anew_in_each_epoch() -> None:
    draws = {tuple(np.concatenate(counts([0.5, 1, 0.5], seed=s, epoch=e)).tolist()) for s in range(4) for e in range(4)}
    assert len(draws) == 16
    first = np.concatenate(counts([0.5, 1, 0.5], seed=2, epoch=1))
    assert first.tolist() == np.concatenate(counts([0.5, 1, 0.5], seed=2, epoch=1)).tolist()
    often = sum(counts([1, 1, 0.3], epoch=epoch)[2] for epoch in range(200))
    assert often.sum() == 200 * 30
    assert often.min() > 30, "every sample has its turn"
    assert often.max() < 90


def test_a_weight_changes_no_other_data_set() -> None:
    assert counts([0.5, 1, 0.5])[0].tolist() == counts([0.5, 2.5, 7])[0].tolist()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 0, 1], r"dataset\[1\].weight=0 must be a finite number above 0; remove the data set to leave it out"),
        ([-1, 1, 1], r"dataset\[0\].weight=-1 must be a finite number above 0"),
        ([1, 1, float("nan")], r"dataset\[2\].weight=nan must be a finite number above 0"),
        ([1, 1, float("inf")], r"dataset\[2\].weight=inf must be a finite number above 0"),
        ([1, "2", 1], r"dataset\[1\].weight='2' must be a finite number above 0"),
        ([1, 0.1, 1], r"dataset\[1\].weight=0.1 draws none of its 4 samples; raise it to 0.25, which draws one, or remove"),
        ([1, 1], r"dataset\[2\] has no weight: 2 are given; give each data set one"),
    ],
)
def test_weights_that_cannot_work(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_samples(SOURCES, weights, seed=0, epoch=0)
