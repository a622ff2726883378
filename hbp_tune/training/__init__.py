"""A run in progress: loss weights, telemetry, validation, faults, saved progress."""

from hbp_tune.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
