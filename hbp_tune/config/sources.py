"""The data sets of a run, as the configuration names them."""

import glob
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hbp_tune.errors import ConfigError

# Kinds of files that our chat data set reads, JSON also compressed (``.gz``).
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv")
_LOCAL_FORMATS = ("json", "csv", "parquet", "arrow", "text")
# Arguments that are ours: torchtune would hand them to `load_dataset`.
_OURS = ("weight", "label")
# How the components are called that take a folder where torchtune's take a file.
READS_FOLDERS = ("HFTokenizer", "ChatDataset")
# Files of a tokenizer's folder that decide tokens, of all kinds of tokenizers.
_TOKENIZER_FILES = (
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSettings:
    """One data set of the configuration.

    Args:
        key: where it stands there, for errors.
        node: with ``_component_`` and that component's arguments alone.
        label: its name in figures and lists; no two are the same.
        weight: how often an epoch draws each of its samples, see `draw_samples`.
        files: its local data files, in the order of its rows.
    """

    key: str
    node: dict[str, Any]
    label: str
    weight: float
    files: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """All that decides a run's tokens.

    Args:
        datasets: in order.
        tokenizer: its settings.
        tokenizer_files: the local files that these name.
    """

    datasets: tuple[DatasetSettings, ...]
    tokenizer: Any
    tokenizer_files: tuple[Path, ...]


def data_settings(dataset: Any, tokenizer: Any, key: str = "dataset") -> DataSettings:
    """Read what the keys ``dataset`` (or ``dataset_val``) and ``tokenizer`` hold, and find their local files."""
    check_tokenizer_files(tokenizer)
    return DataSettings(
        datasets=dataset_settings(dataset, key),
        tokenizer=_plain(tokenizer),
        tokenizer_files=tuple(file for name in strings(tokenizer) for file in _tokenizer_files(name)),
    )


def check_tokenizer_files(tokenizer: Any) -> None:
    """Check that no folder stands where the tokenizer takes a file.

    Raises:
        ConfigError: one does.
    """
    component = str(tokenizer.get("_component_")) if hasattr(tokenizer, "keys") else ""
    if component.endswith(READS_FOLDERS):
        return
    for key in tokenizer if component else ():
        name = tokenizer[key]
        if (key == "path" or key.endswith(("_path", "_file"))) and isinstance(name, str) and os.path.isdir(name):
            names = ", ".join(file.name for file in _tokenizer_files(name)) or "none of the usual ones"
            raise ConfigError(
                f"tokenizer.{key}={name} is a folder; {component} names a file there ({names}), "
                "hbp_tune.components.HFTokenizer a folder"
            )


def _tokenizer_files(name: str) -> list[Path]:
    """Find what decides tokens under a name, which may as well be a whole prompt: Path.is_file fails on long strings."""
    if os.path.isdir(name):
        return tokenizer_files(Path(name))
    return [Path(name)] if os.path.isfile(name) else []


def dataset_settings(dataset: Any, key: str = "dataset") -> tuple[DatasetSettings, ...]:
    """Read one data set, or a list of them.

    Args:
        dataset: the configuration's value.
        key: that it stands under, for errors.

    Raises:
        ConfigError: a weight is not a number above 0, two labels are the same, or a data file is missing or empty.
    """
    nodes = {name: _plain(node) for name, node in dataset_nodes(dataset, key).items()}
    labels = _labels(list(nodes.values()), key)
    settings = []
    for (name, node), label in zip(nodes.items(), labels, strict=True):
        weight = node.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(f"{name}: weight={weight} must be a number above 0; remove the data set to leave it out")
        settings.append(
            DatasetSettings(
                key=name,
                node={key: value for key, value in node.items() if key not in _OURS},
                label=label,
                weight=float(weight),
                files=tuple(_data_files(name, node)),
            )
        )
    return tuple(settings)


def dataset_nodes(dataset: Any, key: str = "dataset") -> dict[str, Any]:
    """Give the nodes of the key ``dataset``, one or many, by where they stand: ``dataset``, or ``dataset[0]`` and so on."""
    nodes = [dataset] if hasattr(dataset, "keys") else list(dataset)
    return {f"{key}[{index}]" if len(nodes) > 1 else key: node for index, node in enumerate(nodes)}


def matching_files(name: str) -> list[Path]:
    """Find the local files of a name or pattern, and all data files of a folder, in the order in which they are loaded."""
    found: list[Path] = []
    for path in map(Path, sorted(glob.glob(name, recursive=True))):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            found += [file for file in inside if file.name.lower().removesuffix(".gz").endswith(DATA_SUFFIXES)]
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def tokenizer_files(folder: Path) -> list[Path]:
    """Find the files of a folder that decide what its tokenizer does."""
    return sorted(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))


def strings(node: Any) -> Iterator[str]:
    """Give all strings inside nested mappings and lists."""
    if isinstance(node, str):
        yield node
    elif hasattr(node, "keys"):
        for key in node:
            yield from strings(node[key])
    elif node is not None and hasattr(node, "__iter__"):
        for item in node:
            yield from strings(item)


def _plain(node: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return dict(plain)


def _labels(nodes: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Give each data set a label: its own, or its file's or hub repository's name with a number where another has that too.

    Raises:
        ConfigError: a label is given twice, or is not text.
    """
    given = [node["label"] for node in nodes if node.get("label") is not None]
    for label in given:
        if not isinstance(label, str) or not label or given.count(label) > 1:
            raise ConfigError(f"{key}: label={label!r} must be a text that no other data set has")
    labels: list[str] = []
    for node in nodes:
        name = label = node.get("label") or _default_label(node)
        number = 2
        while label in labels or (node.get("label") is None and label in given):
            label, number = f"{name}_{number}", number + 1
        labels.append(label)
    return labels


def _default_label(node: Mapping[str, Any]) -> str:
    file = next(strings(node.get("data_files")), None)
    if file is not None:
        return Path(file).name.split(".")[0] or file
    return str(node.get("source") or str(node.get("_component_")).rpartition(".")[2])


def _data_files(name_of_set: str, node: Mapping[str, Any]) -> list[Path]:
    """Find a data set's local files.

    Raises:
        ConfigError: one does not exist, is a folder that the component cannot read, or those of a name are empty.
    """
    files: list[Path] = []
    reads_folders = str(node.get("_component_")).endswith(READS_FOLDERS)
    is_local = node.get("source") in (*_LOCAL_FORMATS, *((None,) if reads_folders else ()))
    for name in strings(node.get("data_files")):
        if "://" in name:
            continue
        found = matching_files(name)
        if is_local and os.path.isdir(name) and not (reads_folders and found):
            way_out = (
                f" without a data file ({', '.join(DATA_SUFFIXES)})"
                if reads_folders
                else f"; name its files, such as {name}/*.jsonl"
            )
            raise ConfigError(f"{name_of_set}: data_files={name} is a folder{way_out}")
        if not found and is_local:
            hint = "; `python -m hbp_tune.demo` makes the demo's data" if "hbp_demo" in name else ""
            raise ConfigError(f"{name_of_set}: data file {name} does not exist (looked from {Path.cwd()}){hint}")
        if found and not any(path.stat().st_size for path in found):
            raise ConfigError(f"{name_of_set}: the data set is empty: data file {name} holds no row")
        files += found
    return files
