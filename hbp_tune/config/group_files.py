"""Packing groups in a file of their own: written when they were chosen, read in place of a configuration's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from hbp_tune.config.building import build
from hbp_tune.errors import ConfigError
from hbp_tune.planning.plans.records import PackingGroup

_COMPONENT = "hbp_tune.components.PackingGroup"


def groups_of(cfg: Mapping[str, Any]) -> tuple[PackingGroup, ...]:
    """Build the packing groups of a configuration: those of ``groups_file`` where that is set, else ``groups``.

    Raises:
        ConfigError: the file does not exist, or is not a list of groups; or ``groups`` is a word, which only ``hbp_plan`` takes.
    """
    nodes = cfg.get("groups")
    if path := cfg.get("groups_file"):
        nodes = _read(Path(path))
    elif isinstance(nodes, str):
        raise ConfigError(
            f"groups={nodes} is not a list of groups; choose them by `tune run hbp_plan --config ... groups=auto`, and train "
            f"with groups_file=PATH of the file that it writes"
        )
    return tuple(build("groups", node) for node in nodes or ())


def _read(path: Path) -> Sequence[DictConfig]:
    """Read the list of groups in a file.

    Raises:
        ConfigError: it does not exist, cannot be read, or has no list ``groups``.
    """
    try:
        read: Any = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"groups_file={path} does not exist; `tune run hbp_plan --config ... groups=auto` or hbp_profile_groups "
            f"writes one into its output_dir"
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(f"groups_file={path} is a folder; name the file in it, such as {path / 'groups.yaml'}") from error
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"groups_file={path} cannot be read: {' '.join(str(error).split())}") from error
    nodes = read.get("groups") if OmegaConf.is_dict(read) else None
    if not OmegaConf.is_list(nodes) or not nodes:
        raise ConfigError(f"groups_file={path} has no list `groups`; it must look like the key of that name in a configuration")
    return list(nodes)


def write_groups(path: Path, groups: Sequence[PackingGroup], comments: Sequence[str]) -> None:
    """Write groups as YAML: a file for ``groups_file``, whose list can as well be copied into a configuration.

    Args:
        path: of the file; its folder must exist.
        groups: from short to long.
        comments: lines on where they come from.
    """
    lines = [*(f"# {line}" for line in comments), "groups:"]
    for group in groups:
        values = {"_component_": _COMPONENT} | asdict(group)
        lines.append("  - " + yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=1000).strip())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
