"""Lengths to plans: groups, packs, micro-steps and optimizer steps. No torch."""

from hbp_tune.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
