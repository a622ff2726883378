"""Configurations: building components, checking keys and folders, errors that name them."""

from hbp_tune.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
