import numpy as np
import pytest

from hbp_tune.errors import ConfigError
from hbp_tune.planning.comparison.distributions import synthetic_lengths

SIZES = {
    "tulu3": [939_343],
    "openhermes": [1_001_551],
    "tulu3_longcite": [939_343, 2_000],
    "openhermes_longcite": [1_001_551, 2_000],
    "tulu3_longwriter": [939_343, 6_000],
}


@pytest.mark.parametrize("name", SIZES)
def test_mixtures_have_the_real_sizes(name: str) -> None:
    lengths, sources = synthetic_lengths(name)
    assert np.bincount(sources).tolist() == SIZES[name]
    assert lengths.shape == sources.shape
    assert (lengths.dtype.name, sources.dtype.name) == ("int32", "int16")
    assert lengths.min() >= 30
    assert lengths.max() <= 131_072


def test_tulu3_is_as_published() -> None:
    lengths, _ = synthetic_lengths("tulu3", seed=1)
    assert 680 < lengths.mean() < 860
    assert (lengths >= 4096).mean() == pytest.approx(0.0146, abs=0.0004)
    assert (lengths >= 8192).mean() == pytest.approx(0.0049, abs=0.0002)
    assert (lengths >= 12_288).mean() == pytest.approx(0.0024, abs=0.0002)
    assert lengths[lengths < 4096].mean() == pytest.approx(600, abs=10)
    assert 32_000 < lengths.max() <= 32_768
    # The body goes on smoothly into the tail: lengths just below 4K are as frequent as those just above.
    below, above = (np.count_nonzero((lengths >= low) & (lengths < low + 200)) for low in (3896, 4096))
    assert below / above == pytest.approx(1.1, abs=0.15)


def test_openhermes_is_as_published() -> None:
    lengths, _ = synthetic_lengths("openhermes", seed=1)
    for share, length in ((0.5, 366), (0.75, 544), (0.9, 745), (0.95, 950), (0.99, 1629), (0.999, 3183)):
        assert (lengths < length).mean() == pytest.approx(share, abs=6 * np.sqrt(share * (1 - share) / len(lengths)))
    assert lengths.mean() == pytest.approx(390, abs=5)
    assert 7500 < lengths.max() <= 8071


@pytest.mark.parametrize("name", ["tulu3_longcite", "openhermes_longcite"])
def test_longcite_follows_its_density(name: str) -> None:
    lengths, sources = synthetic_lengths(name, seed=2)
    long = np.sort(lengths[sources == 1])
    assert long[0] >= 4096
    # The integral of x ** -0.8; 0.036 is the 1% level of the Kolmogorov-Smirnov test with 2,000 samples.
    shares = (long**0.2 - 4096**0.2) / (131_072**0.2 - 4096**0.2)
    assert np.abs(shares - (np.arange(2000) + 0.5) / 2000).max() < 0.036


def test_longwriter_is_as_published() -> None:
    lengths, sources = synthetic_lengths("tulu3_longwriter", seed=2)
    long = lengths[sources == 1]
    for length, share in ((4096, 0.493), (8192, 0.904), (12_288, 0.971)):
        assert (long < length).mean() == pytest.approx(share, abs=0.02)
    assert 24_000 < long.max() <= 32_768
    assert long.min() >= 2048


@pytest.mark.parametrize(("num_samples", "num_long"), [(1, 1), (2, 1), (400, 1), (10_000, 21), (2_000_000, 4249)])
def test_parts_keep_their_proportion(num_samples: int, num_long: int) -> None:
    lengths, sources = synthetic_lengths("tulu3_longcite", num_samples)
    assert len(lengths) == num_samples
    assert np.count_nonzero(sources) == num_long
    assert np.all(lengths[sources == 1] >= 4096)


def test_long_samples_are_spread_over_the_data_set() -> None:
    _, sources = synthetic_lengths("tulu3_longcite")
    per_tenth = [int(part.sum()) for part in np.array_split(sources, 10)]
    assert min(per_tenth) > 140
    assert max(per_tenth) < 260


def test_lengths_depend_on_the_seed_and_on_nothing_else() -> None:
    lengths, sources = synthetic_lengths("tulu3_longcite", 5_000, seed=3)
    again, same_sources = synthetic_lengths("tulu3_longcite", 5_000, seed=3)
    assert np.array_equal(lengths, again)
    assert np.array_equal(sources, same_sources)
    for seed in (4, -3, 2**70):
        other, _ = synthetic_lengths("tulu3_longcite", 5_000, seed=seed)
        assert not np.array_equal(np.sort(lengths), np.sort(other))


def test_lengths_are_the_same_on_every_machine() -> None:
    lengths, sources = synthetic_lengths("tulu3_longcite", 8, seed=0)
    assert lengths.tolist() == [568, 10710, 3310, 259, 189, 232, 622, 395]
    assert sources.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def test_arguments_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"'tulu2' is unknown; choose one of tulu3, openhermes, tulu3_longcite, "):
        synthetic_lengths("tulu2")
    with pytest.raises(ConfigError, match="num_samples=0 must be at least 1"):
        synthetic_lengths("tulu3", 0)
