"""Orders that look random and are the same on every machine, whatever numpy's version."""

import zlib

import numpy as np
from numpy.typing import NDArray


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit integers (Steele, Lea and Flood 2014, the finaliser of SplitMix64); wraps on overflow by design."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hashed_order(num_items: int, *, seed: int, epoch: int, stream: str) -> NDArray[np.int64]:
    """Permute ``0 .. num_items - 1`` by hash.

    Args:
        num_items: how many items to order.
        seed: the run's seed; any whole number.
        epoch: a different epoch gives an unrelated order.
        stream: names the use, so that two orders of one epoch are unrelated.

    Returns:
        ``int64[num_items]``; equal arguments give equal orders on every machine.
    """
    key = _splitmix64(np.array([seed % 2**63], dtype=np.uint64))  # mixed first, or seed 0 epoch 1 would be seed 1 epoch 0
    for part in (epoch, zlib.crc32(stream.encode())):
        key = _splitmix64(key ^ np.uint64(part))
    hashes = _splitmix64(np.arange(num_items, dtype=np.uint64) ^ key)
    return np.argsort(hashes)  # all differ, since mixing is a bijection: any sort gives the same order
