"""Rows to tensors: the tokens and targets of every sample, kept on disk, and packs of them."""

from hbp_tune.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
