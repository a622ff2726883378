"""The data sets of a run, as the configuration names them."""

import glob
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hbp_tune.components.planning.errors import ConfigError

_LOCAL_FORMATS = ("json", "csv", "parquet", "arrow", "text")
# Arguments that are ours: torchtune would hand them to `load_dataset`.
_OURS = ("weight", "label")


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
    return DataSettings(
        datasets=dataset_settings(dataset, key),
        tokenizer=_plain(tokenizer),
        # A tokenizer's arguments may hold whole prompts; Path.is_file fails on strings too long for a name.
        tokenizer_files=tuple(Path(name) for name in strings(tokenizer) if os.path.isfile(name)),
    )


def dataset_settings(dataset: Any, key: str = "dataset") -> tuple[DatasetSettings, ...]:
    """Read one data set, or a list of them.

    Args:
        dataset: the configuration's value.
        key: that it stands under, for errors.

    Raises:
        ConfigError: a weight is no number above 0, two labels are the same, or a data file is missing or empty.
    """
    nodes = [_plain(node) for node in dataset_nodes(dataset)]
    labels = _labels(nodes, key)
    settings = []
    for index, (node, label) in enumerate(zip(nodes, labels, strict=True)):
        weight = node.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(f"{key} {index}: weight={weight} must be a number above 0; remove the data set to leave it out")
        settings.append(
            DatasetSettings(
                key=f"{key}[{index}]",
                node={key: value for key, value in node.items() if key not in _OURS},
                label=label,
                weight=float(weight),
                files=tuple(_data_files(f"{key} {index}", node)),
            )
        )
    return tuple(settings)


def dataset_nodes(dataset: Any) -> list[Any]:
    """Give the nodes of the key ``dataset``, one or many."""
    return [dataset] if hasattr(dataset, "keys") else list(dataset)


def matching_files(name: str) -> list[Path]:
    """Find the local files of a name or pattern, in the order in which they are loaded."""
    return [Path(path) for path in sorted(glob.glob(name, recursive=True)) if Path(path).is_file()]


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
        ConfigError: a label is given twice, or is no text.
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
        ConfigError: one does not exist, or those of a name are empty.
    """
    files: list[Path] = []
    for name in strings(node.get("data_files")):
        if "://" in name:
            continue
        found = matching_files(name)
        if not found and node.get("source") in _LOCAL_FORMATS:
            hint = "; `python -m hbp_tune.demo` makes the demo's data" if "hbp_demo" in name else ""
            raise ConfigError(f"{name_of_set}: data file {name} does not exist (looked from {Path.cwd()}){hint}")
        if found and not any(path.stat().st_size for path in found):
            raise ConfigError(f"{name_of_set}: the data set is empty: data file {name} holds no row")
        files += found
    return files
