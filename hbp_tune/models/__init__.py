"""torchtune's decoders as the other packages need them, and the families that it lacks."""

from hbp_tune.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
