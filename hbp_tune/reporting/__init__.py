"""What plans and runs say: files for programs, pages and tables for people."""

from hbp_tune.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
