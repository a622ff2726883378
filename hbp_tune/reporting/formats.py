"""How numbers are written for people."""

import math


def write_share(share: float) -> str:
    """Write a share of 1 for people, as percent that never rounds to all or nothing: 12.3%, 0.05%, over 99.99%."""
    if not math.isfinite(share):
        return "unknown"
    if 0 < share < 0.00005:
        return "under 0.01%"
    if 0.99995 < share < 1:
        return "over 99.99%"
    return f"{share:.2%}" if 0 < share < 0.0095 or 0.9905 < share < 1 else f"{share:.1%}".replace(".0%", "%")


def write_count(num: int, noun: str) -> str:
    """Write how many there are: 1 rank, 2,048 ranks."""
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def write_tokens(num_tokens: int) -> str:
    """Write a length shortly: 16K for 16384, plain where it is not a multiple of 1024."""
    return f"{num_tokens // 1024:,}K" if num_tokens % 1024 == 0 and num_tokens else f"{num_tokens:,}"


def time_unit(seconds: float) -> tuple[float, str, str]:
    """Choose the unit in which to write a time: how many seconds it has, its sign and its name."""
    units = (
        (172800.0, 86400.0, "days", "days"),
        (7200.0, 3600.0, "h", "hours"),
        (120.0, 60.0, "min", "minutes"),
        (1.0, 1.0, "s", "seconds"),
    )
    return next(((scale, sign, name) for least, scale, sign, name in units if seconds >= least), (1e-3, "ms", "milliseconds"))
