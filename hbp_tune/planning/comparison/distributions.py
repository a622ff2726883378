"""Synthetic lengths with the published statistics of the HBP paper's data sets: for plans and tests without the data."""

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.plans.hashing import _splitmix64, hashed_order

_Density = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class _Span:
    """The ``share`` of samples with lengths ``low .. high - 1``, and the shape of their density."""

    low: int
    high: int
    share: float
    density: _Density


@dataclass(frozen=True, slots=True)
class _Source:
    """A data set: its real size, and spans of length, each beginning where the one before ends."""

    num_samples: int
    spans: tuple[_Span, ...]


def _power(exponent: float) -> _Density:
    return lambda lengths: lengths**exponent


def _log_normal(mu: float, sigma: float) -> _Density:
    return lambda lengths: np.exp(-(((np.log(lengths) - mu) / sigma) ** 2) / 2) / lengths


def _quantiles(*points: tuple[float, int]) -> tuple[_Span, ...]:
    """Join quantiles, each a share of samples and the length that they stay below, by straight lines over the log-length."""
    return tuple(_Span(low, high, upper - lower, _power(-1.0)) for (lower, low), (upper, high) in itertools.pairwise(points))


# The body's mean is 596 tokens; its width makes the density go on smoothly into the tail's. Exponent of the tail: 1 + 1.42.
_TULU3 = _Source(939_343, (_Span(30, 4096, 0.9854, _log_normal(mu=6.0, sigma=0.95)), _Span(4096, 32_769, 0.0146, _power(-2.42))))
_OPENHERMES = _Source(
    1_001_551,
    _quantiles((0, 30), (0.5, 366), (0.75, 544), (0.9, 745), (0.95, 950), (0.99, 1629), (0.999, 3183), (1, 8072)),
)
_LONGCITE = _Source(2_000, (_Span(4096, 131_073, 1.0, _power(-0.8)),))
# Neither end is published: the data set asks for outputs of 2,000 to 32,000 words, and 32K tokens is the cap here.
_LONGWRITER = _Source(6_000, _quantiles((0, 2048), (0.493, 4096), (0.904, 8192), (0.971, 12_288), (1, 32_769)))

_MIXTURES = {
    "tulu3": (_TULU3,),
    "openhermes": (_OPENHERMES,),
    "tulu3_longcite": (_TULU3, _LONGCITE),
    "openhermes_longcite": (_OPENHERMES, _LONGCITE),
    "tulu3_longwriter": (_TULU3, _LONGWRITER),
}


def synthetic_lengths(name: str, num_samples: int | None = None, seed: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int16]]:
    """Draw the lengths of a mixture that the HBP paper trains on.

    What is published, in tokens of Llama 3, and drawn here:

    - ``tulu3``: 939,343 samples of 680 to 860 tokens on average; 0.49% have at least 8K and 0.24% at least 12K. Drawn:
      98.54% log-normal from 30 to 4K, 1.46% Pareto (alpha 1.42) from 4K to 32K, 712 on average.
    - ``openhermes``: 1,001,551 samples with a median of 366, 75% below 544, 90% 745, 95% 950, 99% 1,629, 99.9% 3,183, none
      above 8,071. Drawn: between these, evenly by log-length, 393 on average.
    - LongCite, the long part of ``..._longcite``: about 2,000 samples from 4K to 128K. Drawn: density
      ``len ** -0.8``, with which 0.144 of the tokens of ``tulu3_longcite`` are in samples over 16K.
    - LongWriter, the long part of ``tulu3_longwriter``: 6,000 samples, 49.3% below 4K, 90.4% below 8K, 97.1% below 12K. Drawn:
      between these, evenly by log-length, from 2K to 32K.

    Args:
        name: ``tulu3_longcite``, ``openhermes_longcite`` or ``tulu3_longwriter``; ``tulu3`` or ``openhermes`` alone.
        num_samples: of all parts in proportion, with at least one long sample; by default the real sizes.
        seed: of the lengths and of their order.

    Returns:
        ``int32[num_samples]``, tokens per sample, the parts interleaved at random, and ``int16[num_samples]``, the part of
        each: 0 for the first, 1 for the long one. Equal arguments give equal lengths, whatever numpy's version.

    Raises:
        ConfigError: the name is unknown, or ``num_samples`` is below 1.
    """
    if name not in _MIXTURES:
        raise ConfigError(f"synthetic lengths: {name!r} is unknown; choose one of {', '.join(_MIXTURES)}")
    if num_samples is not None and num_samples < 1:
        raise ConfigError(f"synthetic lengths: num_samples={num_samples} must be at least 1, or be left out for the real size")
    parts = _MIXTURES[name]
    sizes = [part.num_samples for part in parts]
    if num_samples is not None:
        long = [max(1, round(num_samples * size / sum(sizes))) for size in sizes[1:]]
        sizes = [num_samples - sum(long), *long]
    lengths = np.concatenate(
        [
            _draw(part, _uniforms(size, seed, f"{name} {index}"))
            for index, (part, size) in enumerate(zip(parts, sizes, strict=True))
        ]
    )
    sources = np.repeat(np.arange(len(parts), dtype=np.int16), sizes)
    order = hashed_order(len(lengths), seed=seed, epoch=0, stream=name)
    return lengths[order], sources[order]


def _draw(source: _Source, uniforms: NDArray[np.float64]) -> NDArray[np.int32]:
    """Turn uniform numbers into lengths by the inverse of their cumulated probabilities."""
    weights = [span.density(np.arange(span.low, span.high, dtype=np.float64)) for span in source.spans]
    shares = [span.share * each / each.sum() for span, each in zip(source.spans, weights, strict=True)]
    # The last entry is 1 but for rounding; without it, no number can come out above it.
    up_to = np.cumsum(np.concatenate(shares))[:-1]
    return (source.spans[0].low + np.searchsorted(up_to, uniforms, side="right")).astype(np.int32)


def _uniforms(num: int, seed: int, stream: str) -> NDArray[np.float64]:
    """Hash ``0 .. num - 1`` to numbers in [0, 1); equal on every machine, as numpy's generators need not be."""
    key = _splitmix64(np.array([seed % 2**63], dtype=np.uint64))
    key = _splitmix64(key ^ np.uint64(zlib.crc32(stream.encode())))
    hashes = _splitmix64(np.arange(num, dtype=np.uint64) ^ key)
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
