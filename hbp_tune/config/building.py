"""Building components with errors that name the key."""

import difflib
import importlib
import site
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import config

from hbp_tune.errors import ConfigError, HbpError

# Where code lies that is not the user's: lines of it tell the user nothing.
_NOT_THE_USERS = (
    Path(__file__).parents[1],
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")),
    Path(site.getusersitepackages()),
)


def setting(cfg: Mapping[str, Any], key: str) -> Any:
    """Give what a key was set to: a node to build, a word, or None where it is left out or null.

    On the command line torchtune takes ``key=word`` for ``key._component_=word`` where the file has a component.
    """
    node: Any = cfg.get(key)
    if not hasattr(node, "keys") or "_component_" not in node:
        return node
    component = node["_component_"]
    return node if component is not None and "." in component else component


def build_setting(
    cfg: Mapping[str, Any], key: str, *args: Any, default: Callable[[], Any] | str | None = None, **kwargs: Any
) -> Any:
    """Build what a key was set to.

    Args:
        cfg: the whole configuration.
        key: of a component.
        args: for the component, before its own arguments.
        default: makes what a key stands for that is left out or null. A word is given as it is, and so is any other word that the
            key was set to.
        kwargs: for the component.
    """
    node = setting(cfg, key)
    if not node:
        return default() if callable(default) else default
    return node if isinstance(default, str) and isinstance(node, str) else build(key, node, *args, **kwargs)


def build(key: str, node: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """Build the ``_component_`` of a configuration key, as ``torchtune.config.instantiate`` does.

    Arguments that are components themselves (``planner.packer``) are built first, which torchtune leaves to the component.

    Args:
        key: where the node stands, for the error.
        node: with ``_component_`` and its arguments.
        args: passed before the node's arguments.
        kwargs: replace the node's arguments.

    Raises:
        ConfigError: there is no such component, it does not take these arguments, or it cannot be built from them.
    """
    if node is None:
        raise ConfigError(f"config key {key!r} is empty; give it a _component_")
    component: Any = node.get("_component_", "no _component_") if hasattr(node, "get") else node
    try:
        built = _with_built_arguments(key, node)
        if OmegaConf.is_dict(node) and "_component_" in node and isinstance(component, str):
            find_component(key, component)
        return config.instantiate(built, *args, **kwargs)
    except Exception as error:
        if isinstance(error, HbpError):  # it says what is wrong by itself
            raise
        raise ConfigError(_describe(key, component, error)) from error


def find_component(key: str, component: str) -> Any:
    """Find a component by its dotted name, as torchtune does.

    Args:
        key: where it stands, for the error.
        component: such as ``torchtune.models.llama3.llama3_tokenizer``.

    Raises:
        ConfigError: there is none of this name; names that are near are listed. Or its module cannot be imported.
    """
    first, *parts = component.split(".")
    try:
        found: Any = _import(first)
        if found is None:
            raise ConfigError(f"config key {key!r} ({component}) cannot be built: there is no module {first!r}")
        path = first
        for part in parts:
            if not hasattr(found, part):
                inside = _import(f"{path}.{part}") if isinstance(found, ModuleType) and part else None
                if inside is None:
                    near = difflib.get_close_matches(part, [name for name in dir(found) if name[0] != "_"], n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ConfigError(f"config key {key!r} ({component}) cannot be built: {path} has no {part!r}{hint}")
                found = inside
            else:
                found = getattr(found, part)
            path = f"{path}.{part}"
    except Exception as error:
        if isinstance(error, HbpError):
            raise
        raise ConfigError(_describe(key, component, error)) from error
    return found


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # it exists, and imports what does not
            raise
        return None
    except ValueError:  # an empty name
        return None


def _describe(key: str, component: Any, error: Exception) -> str:
    """Say why, and where in the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename[0] != "<" and not _is_foreign(Path(frame.filename))]
    place = f" [{own[-1].filename}:{own[-1].lineno}]" if own else ""
    reason = " ".join(str(error).split())
    return f"config key {key!r} ({component}) cannot be built: {type(error).__name__}: {reason}{place}"


def _is_foreign(file: Path) -> bool:
    return any(file.is_relative_to(folder) for folder in _NOT_THE_USERS)


def _with_built_arguments(key: str, node: DictConfig) -> DictConfig:
    if not OmegaConf.is_dict(node):
        return node  # torchtune says what is wrong with it
    names = [str(name) for name in node if OmegaConf.is_dict(node[name]) and node[name].get("_component_")]
    if not names:
        return node
    built = {name: build(f"{key}.{name}", node[name]) for name in names}
    plain: Any = OmegaConf.to_container(node, resolve=True)
    return OmegaConf.create({**plain, **built}, flags={"allow_objects": True})
