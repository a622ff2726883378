"""Packaged configurations by name, and the way into a recipe."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

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
    try:
        is_mapping = OmegaConf.is_dict(OmegaConf.load(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not is_mapping:
        raise ConfigError(f"--config {path} must hold a mapping of keys to values")
    return path


def run_recipe(recipe_main: Callable[[], Any]) -> None:
    """Run a recipe's ``@config.parse``d main from the command line.

    torchtune parses a file's path only, so a packaged name is replaced by its path first. What the user can mend ends
    in one line, from rank 0, rather than in one traceback per rank.
    """
    try:
        for index, argument in enumerate(sys.argv[:-1]):
            if argument == "--config":
                sys.argv[index + 1] = str(find_config(sys.argv[index + 1]))
        recipe_main()
    except HbpError as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"\nerror: {error}\n")
            sys.stderr.flush()
        sys.exit(1)
