"""Packaged configurations by name, and the way into a recipe."""

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from hbp_tune.components.config.failures import end_after_cause, end_in_one_line, is_lost_contact, record_for_torchrun
from hbp_tune.components.planning.errors import ConfigError, HbpError

_PACKAGE = Path(__file__).parents[2]
# Beside the modules in a wheel, beside the package in a checkout (editable installs).
_CONFIG_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def packaged_configs() -> dict[str, Path]:
    """Find the packaged configurations: ``llama3_1/8B_hbp_full`` and its file, and so on."""
    folder = next(folder for folder in _CONFIG_FOLDERS if folder.is_dir())
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def find_config(name: str) -> Path:
    """Find a configuration: an existing file wins, then a packaged name.

    Raises:
        ConfigError: it is neither; the packaged names are listed. Or the file is no YAML mapping.
    """
    path = Path(name)
    if not path.is_file():
        packaged = packaged_configs()
        if name not in packaged:
            raise ConfigError(f"--config {name}: no such file, and no packaged config; packaged are {', '.join(packaged)}")
        path = packaged[name]
    read_mapping(path, "--config ")
    return path


def read_yaml(path: Path, option: str = "") -> Any:
    """Read a configuration; ``option`` stands before its path in what an error says.

    Raises:
        ConfigError: it is no YAML.
    """
    try:
        return OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:  # omegaconf raises OSError for a bare number
        raise ConfigError(f"{option}{path} is no valid YAML: {' '.join(str(error).split())}") from error


def read_mapping(path: Path, option: str = "") -> DictConfig:
    """Read a configuration of keys; ``option`` as in `read_yaml`.

    Raises:
        ConfigError: it is no YAML, or no mapping.
    """
    cfg = read_yaml(path, option)
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{option}{path} must hold a mapping of keys to values")
    return cfg


def merge_list_overrides(arguments: list[str], path: Path) -> list[str]:
    """Turn overrides of single list items into one override of each list.

    Args:
        arguments: of the command line.
        path: of the configuration that they override.

    Raises:
        ConfigError: the configuration has no such list or item.
    """
    cfg: Any = OmegaConf.load(path)
    others, lists = [], []
    for argument in arguments:
        if not (match := re.fullmatch(r"(\w+)\.(\d+)((?:\.\w+)*)=(.*)", argument, re.DOTALL)):
            others.append(argument)
            continue
        key, index, rest, value = match.groups()
        if not OmegaConf.is_list(cfg.get(key)) or int(index) >= len(cfg[key]):
            raise ConfigError(f"{argument}: {path} has no list {key!r} with an item {index}; items count from 0")
        # As in torchtune's own overrides, "None" is null.
        parsed = OmegaConf.from_dotlist([f"value={'null' if value == 'None' else value}"]).value
        OmegaConf.update(cfg, f"{key}[{index}]{rest}", parsed)
        lists.append(key)
    # torchtune splits an override at every "=", so those inside values are escaped.
    dumped = {key: json.dumps(OmegaConf.to_container(cfg[key])).replace("=", "\\u003d") for key in lists}
    return [*others, *(f"{key}={value}" for key, value in dumped.items())]


def _silence_known_noise() -> None:
    """Keep back what libraries say at every start, on every rank, and no user can act on."""
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 under torch 2.13
    # Only GPU runs see these: torchtune's RMSNorm keeps its input in fp32 beside bf16 weights, and every rank has one device.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    # DTensor on gloo exchanges shards by all-gather; only CPU runs see this.
    logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)


def run_recipe(recipe_main: Callable[[], Any]) -> None:
    """Run a recipe's ``@config.parse``d main from the command line.

    torchtune parses a file's path only, so a packaged name is replaced by its path first; and it cannot override one
    item of a list (``groups.1.cp_degree=4``), so that becomes an override of the whole list. What the user can mend
    ends in one line rather than in one traceback per rank, and so does what is only another rank's failure.
    """
    _silence_known_noise()
    # tiktoken keeps a copy of every tokenizer file by its path, and would go on with the copy when the file has changed.
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")
    try:
        if "--config" in sys.argv[:-1]:
            name = sys.argv.index("--config") + 1
            path = find_config(sys.argv[name])
            sys.argv = merge_list_overrides([*sys.argv[:name], str(path), *sys.argv[name + 1 :]], path)
        recipe_main()
    except (HbpError, InterpolationResolutionError) as error:
        end_in_one_line(error)
    except BaseException as error:  # torch's `CheckpointException` is no `Exception`
        if is_lost_contact(error):
            end_after_cause(error)
        if not isinstance(error, SystemExit):
            record_for_torchrun(error)
        raise
