"""Packaged configurations by name, and the way into a recipe."""

import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from torchtune.config._utils import _merge_yaml_and_cli_args  # of 0.6.1

from hbp_tune.config.failures import (
    end_after_cause,
    end_in_one_line,
    is_lost_contact,
    print_anywhere,
    record_for_torchrun,
)
from hbp_tune.errors import ConfigError, HbpError

_PACKAGE = Path(__file__).parents[1]
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
        raise ConfigError(f"{option}{path} is not valid YAML: {' '.join(str(error).split())}") from error


def read_mapping(path: Path, option: str = "") -> DictConfig:
    """Read a configuration of keys; ``option`` as in `read_yaml`.

    Raises:
        ConfigError: it is no YAML, or no mapping.
    """
    cfg = read_yaml(path, option)
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{option}{path} must hold a mapping of keys to values")
    return cfg


def read_overrides(arguments: Sequence[str], path: Path) -> list[str]:
    """Write overrides so that torchtune's parser reads them as they are meant.

    Args:
        arguments: ``key=value`` each, or ``~key``.
        path: of the configuration that they override.

    Raises:
        ConfigError: one is not an override, or means something else than it looks like.
    """
    escaped = [argument if argument.startswith("~") else _escaped(argument) for argument in arguments]
    merged = merge_list_overrides(escaped, path)
    plain: Any = OmegaConf.to_container(OmegaConf.load(path))
    try:
        _merge_yaml_and_cli_args(Namespace(**plain), merged)
    except (ValueError, KeyError, TypeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"overrides {' '.join(arguments)} do not go with {path}: {' '.join(str(error).split())}") from error
    return merged


def _escaped(argument: str) -> str:
    """Check one override, and hide the "=" inside its value, at which torchtune would split it.

    Raises:
        ConfigError: it is none, or YAML reads its value as something that nobody writes on purpose.
    """
    key, sign, value = argument.partition("=")
    if not sign or not key or key.startswith("-"):
        raise ConfigError(f"{argument!r} on the command line is not an override; write key=value, without spaces around the =")
    if problem := _misread(value.strip()):
        quoted = shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}")
        raise ConfigError(f"{argument}: YAML reads the value as {problem}; if it is text, quote it: {quoted}")
    if "=" not in value:
        return argument
    parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    return f"{key}={_dumped(parsed['value'])}"


def _dumped(value: Any) -> str:
    """Write a value as JSON, which YAML reads alike, without the "=" at which torchtune would split it."""
    # JSON's own escapes of letters beyond 16 bits would be two letters in YAML.
    return json.dumps(value, ensure_ascii=False).replace("=", "\\u003d")


def _misread(value: str) -> str | None:
    """Say what YAML makes of a value that does not look like it: a comment, a mapping without braces, an open quote."""
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        return f"an error ({getattr(error, 'problem', None) or 'a letter that cannot be printed'})"
    if node is None:
        return "a comment, which is nothing" if value else None
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None and not value.startswith("!")
    is_block = isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")
    if is_block or node.end_mark.index < len(value) or (is_plain and node.value != value):
        return f"{node.value!r}" if isinstance(node, yaml.ScalarNode) else "a part of it"
    return None


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
    return [*others, *(f"{key}={_dumped(OmegaConf.to_container(cfg[key]))}" for key in dict.fromkeys(lists))]


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

    Raises:
        SystemExit: after Ctrl-C.
    """
    _silence_known_noise()
    print_anywhere()
    # tiktoken keeps a copy of every tokenizer file by its path, and would go on with the copy when the file has changed.
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")
    try:
        if "--config" in sys.argv[:-1]:
            name = sys.argv.index("--config") + 1
            path = find_config(sys.argv[name])
            if not {"-h", "--help"} & set(sys.argv):
                overrides = read_overrides([*sys.argv[1 : name - 1], *sys.argv[name + 1 :]], path)
                sys.argv = [sys.argv[0], "--config", str(path), *overrides]
        recipe_main()
    except (HbpError, InterpolationResolutionError) as error:
        end_in_one_line(error)
    except KeyboardInterrupt:  # the user knows
        raise SystemExit(128 + signal.SIGINT) from None
    except BaseException as error:  # torch's `CheckpointException` is not an `Exception`
        if is_lost_contact(error):
            end_after_cause(error)
        if not isinstance(error, SystemExit):
            record_for_torchrun(error)
        raise
