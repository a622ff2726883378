"""Hierarchical Balance Packing for torchtune: fine-tune on mixed short and long data without wasting the hardware."""

from hbp_tune.lazy import lazy_names

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
