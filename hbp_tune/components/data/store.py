"""The token store: every data set is tokenised once, in parallel, and read memory-mapped by all ranks."""

import functools
import importlib.metadata
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from hbp_tune.components.data.batch import IGNORE_INDEX
from hbp_tune.components.planning.errors import DataError, HbpError

# Below this many rows a further process costs more to start than it saves.
_ROWS_PER_PROCESS = 500
_POLL_S = 0.1


class SampleSource(Protocol):
    """Any torchtune SFT data set: rows of ``tokens`` and ``labels``, -100 where a token does not count."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class TokenStore:
    """Tokens of all samples, memory-mapped, with their counts.

    Args:
        path: a finished store, made by `open_token_store`.

    Attributes:
        lengths: ``int32[num_samples]``, tokens per sample.
        sources: ``int16[num_samples]``, which of the configured data sets a sample comes from.
        fingerprint: of all tokens and targets, in order: what resuming compares.
    """

    def __init__(self, path: Path) -> None:
        table = datasets.load_from_disk(str(path))
        self._table = table.with_format("arrow")
        self.lengths: NDArray[np.int32] = _values(table, "num_tokens")
        self.sources: NDArray[np.int16] = _values(table, "source")
        self._num_targets: NDArray[np.int32] = _values(table, "num_targets")
        self.fingerprint: str = (path / _FINGERPRINT).read_text()

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, sample_ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Read samples one after the other.

        Args:
            sample_ids: ``int32[num_docs]``.
            lengths: ``int32[num_docs]``, how many tokens to take of each.

        Returns:
            ``int32[sum(lengths)]`` tokens, and ``bool[sum(lengths)]``: which of them count as prediction targets.
        """
        if not len(sample_ids):
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.bool_)
        rows: pa.Table = self._table[sample_ids.tolist()]
        parts = []
        for name in ("tokens", "is_target"):
            column = rows[name].combine_chunks()
            offsets = column.offsets.to_numpy()
            values = column.values.to_numpy(zero_copy_only=False)
            spans = [values[start : start + length] for start, length in zip(offsets[:-1], lengths, strict=True)]
            parts.append(np.concatenate(spans))
        return parts[0], parts[1]

    def num_targets_within(self, max_len: int) -> NDArray[np.int32]:
        """Count each sample's prediction targets among its first ``max_len`` tokens, ``int32[num_samples]``.

        The first token is never a target: nothing comes before it.
        """
        num_targets = self._num_targets.copy()
        for sample_id in np.flatnonzero(self.lengths > max_len):
            _, is_target = self.read(np.array([sample_id]), np.array([max_len]))
            num_targets[sample_id] = is_target[1:].sum()
        return num_targets


def open_token_store(
    sources: Sequence[SampleSource], path: Path, *, is_builder: bool, num_processes: int | None = None
) -> TokenStore:
    """Open the token store at ``path``; one rank per node makes it first where it does not exist yet.

    The other ranks wait for the finished folder to appear, not in a collective: no time-out, however long it takes.

    Args:
        sources: the data sets, tokenised one after the other: sample ids run through all of them.
        path: a folder named by a key over everything that decides its content.
        is_builder: whether this rank makes the store.
        num_processes: to tokenise with; by default one per CPU and 500 rows.

    Returns:
        The store. A row that cannot be read as a training sample, or no row at all, is a `DataError`.
    """
    check_not_empty(sources)
    if is_builder and not path.exists():
        _build(sources, path, num_processes or len(os.sched_getaffinity(0)))
    while not path.exists():
        time.sleep(_POLL_S)
    return TokenStore(path)


def check_not_empty(sources: Sequence[SampleSource]) -> None:
    """Refuse data sets without a row.

    Raises:
        DataError: there is none.
    """
    if not sum(len(source) for source in sources):
        raise DataError("the data set is empty: it has no row; check data_files, split and filters")


def unreadable_row(source: int, row: int, error: Exception) -> DataError:
    """Say which row of which data set could not be read as a training sample, and why."""
    return DataError(
        f"row {row} of data set {source} is no conversation that its component can read: "
        f"{type(error).__name__}: {error}. Check the row, conversation_column and conversation_style"
    )


def store_key(parts: Sequence[Any], files: Sequence[Path]) -> str:
    """Name a store by what decides its content: settings (by their ``repr``) and the bytes of local files.

    Args:
        parts: plain values, such as the data sets' and the tokenizer's configuration. torchtune's version, whose
            templates and tokenizers they name, is always among them.
        files: data and tokenizer files; read in full, at several GB a second from cache.
    """
    digest = xxhash.xxh3_128(repr([_FORMAT, importlib.metadata.version("torchtune"), *parts]).encode())
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return str(digest.hexdigest())


def default_store_directory() -> Path:
    """Give the folder for token stores: in Hugging Face's data set cache (``HF_DATASETS_CACHE``), shared between runs."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "hbp_tune"


_FORMAT = "token store 1"  # raised when the columns or their meaning change
_FINGERPRINT = "content_fingerprint.txt"


def _values(table: datasets.Dataset, name: str) -> NDArray[Any]:
    return np.concatenate([chunk.to_numpy() for chunk in table.data.column(name).chunks])


def _content_fingerprint(table: datasets.Dataset) -> str:
    digest = xxhash.xxh3_128(_values(table, "num_tokens").tobytes())
    for name in ("tokens", "is_target"):
        for chunk in table.data.column(name).chunks:
            digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return str(digest.hexdigest())


def _build(sources: Sequence[SampleSource], path: Path, num_processes: int) -> None:
    starts = np.concatenate(([0], np.cumsum([len(source) for source in sources])))
    num_rows = int(starts[-1])
    # Written aside and renamed: a store that exists is complete. The name keeps builders on a shared disk apart.
    aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "work").mkdir(parents=True)
    num_processes = max(1, min(num_processes, num_rows // _ROWS_PER_PROCESS))
    try:
        rows = datasets.Dataset.from_dict({"row": np.arange(num_rows)}).map(
            functools.partial(_tokenize, sources=sources, starts=starts),
            remove_columns=["row"],
            features=datasets.Features(
                {
                    "tokens": datasets.Sequence(datasets.Value("int32")),
                    "is_target": datasets.Sequence(datasets.Value("bool")),
                    "num_tokens": datasets.Value("int32"),
                    "num_targets": datasets.Value("int32"),
                    "source": datasets.Value("int16"),
                }
            ),
            num_proc=num_processes if num_processes > 1 else None,
            cache_file_name=str(aside / "work" / "rows.arrow"),
            new_fingerprint=path.name,  # the default would hash the data sets row by row
            desc="Tokenising",
        )
        rows.save_to_disk(str(aside / "store"))
        (aside / "store" / _FINGERPRINT).write_text(_content_fingerprint(rows))
        try:
            (aside / "store").rename(path)
        except OSError:
            if not path.exists():  # another node on a shared disk may have been faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tokenize(row: dict[str, int], *, sources: Sequence[SampleSource], starts: NDArray[np.int64]) -> dict[str, Any]:
    source = int(np.searchsorted(starts, row["row"], side="right")) - 1
    local_row = row["row"] - int(starts[source])
    try:
        sample = sources[source][local_row]
        tokens, labels = np.asarray(sample["tokens"], dtype=np.int32), np.asarray(sample["labels"])
    except HbpError:
        raise
    except Exception as error:
        raise unreadable_row(source, local_row, error) from error
    is_target = labels != IGNORE_INDEX
    if len(labels) != len(tokens) or (labels[is_target] != tokens[is_target]).any():
        raise DataError(
            f"row {local_row} of data set {source}: labels must equal tokens or be {IGNORE_INDEX}; this component gives others"
        )
    return {
        "tokens": tokens,
        "is_target": is_target,
        "num_tokens": len(tokens),
        "num_targets": int(is_target[1:].sum()),
        "source": source,
    }
