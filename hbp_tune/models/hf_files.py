"""What is in the files of a Hugging Face checkpoint, from their headers: names, shapes, types; nothing of the weights is read."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbp_tune.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Of a file of safetensors: no header is longer.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Args:
        file: its name in the checkpoint's folder.
        shape: of the tensor.
        dtype: in safetensors' words, ``BF16`` and so on.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint, those of its index where it has one; other files of the folder do not count.

    Raises:
        ConfigError: there is no such folder or no weights in it, a file is missing or cut off, or the index is not true.
    """
    if not folder.is_dir():
        raise ConfigError(f"checkpointer.checkpoint_dir={folder} is not a folder (looked from {Path.cwd()})")
    index = _read_index(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(index.values())) if index else [SINGLE]:
        for name, stored in _read_header(folder / file).items():
            if index.get(name, file) == file:
                tensors[name] = stored
    if missing := sorted(index.keys() - tensors.keys()):
        raise ConfigError(
            f"{folder / INDEX} says that {missing[0]} is in {index[missing[0]]}, which does not have it; download the "
            f"checkpoint again"
        )
    return tensors


def _read_index(folder: Path) -> Mapping[str, str]:
    """Give the file of each tensor; empty where there is one file.

    Raises:
        ConfigError: the index is broken, names a file that is not there, or there are no weights.
    """
    path = folder / INDEX
    if not path.exists():
        if (folder / SINGLE).exists():
            return {}
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".incomplete", ".pth"))
        holds = f"it holds {', '.join(others[:4])}{' ...' if len(others) > 4 else ''}" if others else "it holds no weights"
        raise ConfigError(f"{folder} has neither {SINGLE} nor {INDEX}, {holds}; name a checkpoint's folder, or download it again")
    try:
        weight_map: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not an index of weights ({type(error).__name__}: {error}); download it again") from error
    missing = sorted(file for file in set(weight_map.values()) if not (folder / file).exists())
    if missing:
        raise ConfigError(
            f"{path} names {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}, which {folder} does not hold; "
            f"download the checkpoint again"
        )
    return weight_map


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a file, and compare its size with what the header says.

    Raises:
        ConfigError: the file is cut off, or is not one of safetensors.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(min(length, _LONGEST_HEADER)))
        header.pop("__metadata__", None)
        tensors = {name: StoredTensor(path.name, tuple(one["shape"]), one["dtype"]) for name, one in header.items()}
        end = 8 + length + max((one["data_offsets"][1] for one in header.values()), default=0)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ConfigError(f"{path} is not a file of safetensors, or is cut off ({error}); download it again") from error
    if size < end:
        raise ConfigError(f"{path} is cut off: it has {size:,} of {end:,} bytes; download it again")
    return tensors
