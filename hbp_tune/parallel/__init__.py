"""Ranks and layers: context parallelism, attention, recomputation, loss heads, FSDP2."""

from hbp_tune.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
