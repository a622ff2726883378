"""What a YAML file's `_component_:` and a copied recipe use, by its public name.

`__init__.pyi` beside this file lists the names and where each lives. They are imported at first use, so that planning
never imports torch.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

_HOMES = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body
    if isinstance(node, ast.ImportFrom) and node.module
    for alias in node.names
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
