"""Building components with errors that name the key."""

import traceback
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import config

from hbp_tune.components.planning.errors import ConfigError, HbpError


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
    try:
        return config.instantiate(_with_built_arguments(key, node), *args, **kwargs)
    except Exception as error:
        if isinstance(error, HbpError):  # it says what is wrong by itself
            raise
        component = node.get("_component_", "no _component_") if hasattr(node, "get") else node
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"config key {key!r} ({component}) cannot be built: {type(error).__name__}: {' '.join(str(error).split())} "
            f"[{place.filename}:{place.lineno}]"
        ) from error


def _with_built_arguments(key: str, node: DictConfig) -> DictConfig:
    if not OmegaConf.is_dict(node):
        return node  # torchtune says what is wrong with it
    names = [str(name) for name in node if OmegaConf.is_dict(node[name]) and node[name].get("_component_")]
    if not names:
        return node
    built = {name: build(f"{key}.{name}", node[name]) for name in names}
    plain: Any = OmegaConf.to_container(node, resolve=True)
    return OmegaConf.create({**plain, **built}, flags={"allow_objects": True})
