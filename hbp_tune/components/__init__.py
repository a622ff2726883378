"""What a configuration names as a component: ``_component_: hbp_tune.components.NAME``."""

from hbp_tune.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
