"""The token store: every data set is tokenised once, by all ranks together, and read memory-mapped by each."""

import contextlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from hbp_tune.data.store.notes import Note, join_notes
from hbp_tune.data.store.rows import BadRow, RowReader, SampleSource, no_sample
from hbp_tune.data.store.shards import Shard, ShardBuilders, ShardSummary, cut_shards
from hbp_tune.errors import DataError
from hbp_tune.planning.plans.truncation import CUTS, kept_tokens

_POLL_S = 0.1


class TokenStore:
    """Tokens of all samples, memory-mapped, with their counts.

    Args:
        shards: finished ones, in order.
        names: the data sets' keys in the configuration, for errors.

    Attributes:
        lengths: ``int32[num_samples]``, tokens per sample.
        sources: ``int16[num_samples]``, which of the configured data sets a sample comes from.
        num_targets: ``int32[num_samples]``, labels of each that count toward the loss.
        rows: ``int32[num_samples]``, its row there; bad rows leave gaps.
        bad_rows: the rows that are not samples, in order.
        notes: what was done to rows that are.
        fingerprint: of all tokens and targets, in order: what resuming compares.

    Raises:
        DataError: no row is a sample.
    """

    def __init__(self, shards: Sequence[Shard], names: Sequence[str]) -> None:
        summaries = [ShardSummary.read(shard.summary) for shard in shards]
        self.bad_rows: tuple[BadRow, ...] = tuple(row for summary in summaries for row in summary.bad_rows)
        self.notes: tuple[Note, ...] = tuple(join_notes(note for summary in summaries for note in summary.notes))
        self.fingerprint: str = xxhash.xxh3_128("".join(summary.digest for summary in summaries).encode()).hexdigest()
        tables = [
            datasets.Dataset.from_file(str(shard.table))
            for shard, summary in zip(shards, summaries, strict=True)
            if summary.num_samples
        ]
        if not tables:
            raise DataError(no_sample(self.bad_rows, names))
        table = datasets.concatenate_datasets(tables)
        self._table = table.with_format("arrow")
        self.lengths: NDArray[np.int32] = _values(table, "num_tokens")
        self.sources: NDArray[np.int16] = _values(table, "source")
        self.rows: NDArray[np.int32] = _values(table, "row")
        self.num_targets: NDArray[np.int32] = _values(table, "num_targets")

    def __len__(self) -> int:
        return len(self.lengths)

    def read(
        self, sample_ids: NDArray[np.int32], lengths: NDArray[np.int32], cut: str = CUTS[0]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Read samples one after the other.

        Args:
            sample_ids: ``int32[num_docs]``.
            lengths: ``int32[num_docs]``, how many tokens to take of each.
            cut: how to choose them of a sample that has more; see `kept_tokens`.

        Returns:
            ``int32[sum(lengths)]`` tokens, and ``bool[sum(lengths)]``: which of them count as prediction targets.
        """
        if not len(sample_ids):
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.bool_)
        rows: pa.Table = self._table[sample_ids.tolist()]
        columns = [rows[name].combine_chunks() for name in ("tokens", "is_target")]
        tokens, is_target = (column.values.to_numpy(zero_copy_only=False) for column in columns)
        offsets = columns[0].offsets.to_numpy()
        spans: list[slice | NDArray[np.int64]] = []
        for start, stop, length in zip(offsets[:-1], offsets[1:], lengths, strict=True):
            is_whole = length == stop - start
            spans.append(slice(start, stop) if is_whole else start + kept_tokens(is_target[start:stop], int(length), cut))
        return np.concatenate([tokens[span] for span in spans]), np.concatenate([is_target[span] for span in spans])

    def num_targets_within(self, max_len: int, cut: str = CUTS[0]) -> NDArray[np.int32]:
        """Count each sample's prediction targets once it is cut to ``max_len`` tokens, ``int32[num_samples]``.

        The first token is never a target: nothing comes before it.
        """
        num_targets = self.num_targets.copy()
        for sample_id in np.flatnonzero(self.lengths > max_len):
            _, is_target = self.read(np.array([sample_id]), np.array([max_len]), cut)
            num_targets[sample_id] = is_target[1:].sum()
        return num_targets


def _values(table: datasets.Dataset, name: str) -> NDArray[Any]:
    return np.concatenate([chunk.to_numpy() for chunk in table.data.column(name).chunks])


def no_watch(progress: int) -> None:
    """Take no notice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Builder:
    """What this process does for a store that is not finished.

    Args:
        num_processes: to tokenise with.
        first: where in the rows to begin, from 0 to 1; those who begin apart seldom meet.
        show_progress: show one line of rows done, by anyone.
        watch: called some times a second with a number that grows with what is done; may raise.
    """

    num_processes: int
    first: float = 0.0
    show_progress: bool = True
    watch: Callable[[int], None] = no_watch

    @classmethod
    def alone(cls) -> "Builder":
        """Use all CPUs."""
        return cls(num_processes=len(os.sched_getaffinity(0)))

    @classmethod
    def of_rank(cls, rank: int, world_size: int, local_world_size: int, watch: Callable[[int], None]) -> "Builder":
        """Share CPUs with the ranks of the node, and the rows with all ranks."""
        return cls(
            num_processes=max(1, len(os.sched_getaffinity(0)) // local_world_size),
            first=rank / world_size,
            show_progress=rank == 0,
            watch=watch,
        )


def open_token_store(
    sources: Sequence[SampleSource], path: Path, builder: Builder | None = None, names: Sequence[str] | None = None
) -> TokenStore:
    """Open the token store at ``path``, after making what is missing of it together with everyone else who opens it.

    Args:
        sources: the data sets, tokenised one after the other: sample ids run through all of them.
        path: a folder named by a key over everything that decides its content.
        builder: what this process does for it; by default all that its CPUs can.
        names: the data sets' keys in the configuration, for errors.

    Returns:
        The store. No row at all, none that is a sample, or a shard of rows that all are bad alike, is a `DataError`.
    """
    rows = RowReader(sources, names)
    shards = cut_shards(len(rows), path)
    if not all(shard.summary.exists() for shard in shards):
        path.mkdir(parents=True, exist_ok=True)
        _build(shards, rows, path, builder or Builder.alone())
    return TokenStore(shards, rows.names)


def _build(shards: Sequence[Shard], rows: RowReader, path: Path, builder: Builder) -> None:
    bar = tqdm(total=len(rows), desc="Tokenising", unit=" rows", mininterval=1.0, disable=not builder.show_progress)
    with bar, ShardBuilders(shards, rows, num_processes=builder.num_processes, first=builder.first) as builders:
        while missing := [shard for shard in shards if not shard.summary.exists()]:
            bar.update(len(rows) - sum(shard.stop - shard.start for shard in missing) - bar.n)
            builders.check()
            builder.watch(_bytes_written(path))
            time.sleep(_POLL_S)
        bar.update(len(rows) - bar.n)


def _bytes_written(path: Path) -> int:
    size = 0
    with os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                size += entry.stat().st_size
    return size


def store_key(parts: Sequence[Any], digests: Mapping[Path, str]) -> str:
    """Name a store by what decides its content: settings (by their ``repr``) and the bytes of local files.

    Args:
        parts: plain values, such as the data sets' and the tokenizer's configuration. The versions of
            the libraries that tokenise are always among them.
        digests: of data and tokenizer files, by `digest_files`; where the files lie does not matter.
    """
    versions = [importlib.metadata.version(name) for name in ("torchtune", "transformers", "tokenizers")]
    named = [_FORMAT, *versions, *parts, *digests.values()]
    return str(xxhash.xxh3_128(repr(named).encode()).hexdigest())


def digest_files(files: Sequence[Path]) -> dict[Path, str]:
    """Digest the bytes of each file; read in full, at several GB a second from cache."""
    return {file: _digest(file) for file in files}


def _digest(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return str(digest.hexdigest())


def default_store_directory() -> Path:
    """Give the folder for token stores: in Hugging Face's data set cache (``HF_DATASETS_CACHE``), shared between runs."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "hbp_tune"


_FORMAT = "token store 4"  # raised when the columns or their meaning change
