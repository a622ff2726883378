"""Tokens on disk, shard by shard: whoever has nothing to do takes the next shard that nobody has.

A shard counts when its summary exists, which is written last. So a build that was cut off goes on where it was, ranks on a shared
disk share the work, and those of a rank that died are taken by others: its locks die with it.
"""

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from filelock import FileLock, Timeout

from hbp_tune.data.store.notes import Note, join_notes
from hbp_tune.data.store.rows import BadRow, RowReader, Sample, no_sample
from hbp_tune.errors import DataError
from hbp_tune.reporting.terminal.bad_rows import kind_of_reason

SCHEMA = pa.schema(
    {
        "tokens": pa.list_(pa.int32()),
        "is_target": pa.list_(pa.bool_()),
        "num_tokens": pa.int32(),
        "num_targets": pa.int32(),
        "source": pa.int16(),
        "row": pa.int32(),
    }
)
# Files stay few and small enough to divide: at most 256 of them, each of 256 rows or more.
_MOST_SHARDS = 256
_LEAST_ROWS = 256
# What a builder holds in memory: some MB. One sample alone may be more.
_BATCH_TOKENS = 2**20
_BATCH_ROWS = 1024
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Rows ``start`` to ``stop``, counted through all data sets, and where their tokens go."""

    start: int
    stop: int
    table: Path

    @property
    def summary(self) -> Path:
        """A small file that says what the table holds, and that it is complete."""
        return self.table.with_suffix(".json")

    @property
    def lock(self) -> Path:
        """Held by the process that makes the table."""
        return self.table.with_suffix(".lock")

    @property
    def aside(self) -> Path:
        """The table while it is made."""
        return self.table.with_suffix(".tmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSummary:
    """What a finished shard holds: samples, their content's digest, rows that are not samples, and what was done to others."""

    num_samples: int
    digest: str
    bad_rows: tuple[BadRow, ...]
    notes: tuple[Note, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "ShardSummary":
        """Read the file beside a shard's table."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        bad_rows = tuple(BadRow(**row) for row in fields["bad_rows"])
        notes = tuple(Note(**note | {"first": tuple(map(tuple, note["first"]))}) for note in fields["notes"])
        return cls(num_samples=fields["num_samples"], digest=fields["digest"], bad_rows=bad_rows, notes=notes)


def cut_shards(num_rows: int, directory: Path) -> list[Shard]:
    """Cut rows into shards of nearly equal size, by their number alone: every builder cuts alike."""
    num_shards = min(_MOST_SHARDS, -(-num_rows // _LEAST_ROWS))
    bounds = [num_rows * i // num_shards for i in range(num_shards + 1)]
    return [
        Shard(start=start, stop=stop, table=directory / f"{i:03d}.arrow")
        for i, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]


class ShardBuilders:
    """Processes that make the missing shards; to be used in a ``with`` statement, which ends them.

    Forked, so that nothing is pickled and no import runs again; they only tokenise, and touch no process group and no device.

    Args:
        shards: all of the store's.
        rows: what to tokenise.
        num_processes: to start, at most one a missing shard.
        first: where in the shards to begin, from 0 to 1; builders that begin apart seldom meet.
    """

    def __init__(self, shards: Sequence[Shard], rows: RowReader, *, num_processes: int, first: float = 0.0) -> None:
        missing = [shard for shard in shards if not shard.summary.exists()]
        context: Any = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        self._processes = []
        num_processes = min(num_processes, len(missing))
        for process in range(num_processes):
            start = int((first + process / num_processes) * len(missing)) % len(missing)
            ours, theirs = context.Pipe(duplex=False)
            arguments = (missing[start:] + missing[:start], rows, os.getpid(), theirs)
            self._processes.append(context.Process(target=_build, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()
            self._pipes.append(ours)

    def __enter__(self) -> "ShardBuilders":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def check(self) -> None:
        """Raise the first error of a builder.

        Raises:
            DataError: a builder was killed.
        """
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            exitcode = process.exitcode  # before the pipe: what was said at the end is there by then
            try:
                if pipe.poll():
                    raise pipe.recv()
            except EOFError:
                pass
            if exitcode:
                raise DataError(
                    f"a process that tokenises ended with exit code {exitcode}; -9 mostly means that memory ran out: "
                    "start with fewer CPUs (taskset), as there is one process each"
                )


def _build(shards: Sequence[Shard], rows: RowReader, parent: int, pipe: Connection) -> None:
    # Ctrl-C reaches all processes of a terminal: the parent ends this one. Its own handlers are not for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # a forked process has none of its parent's threads, which OpenMP does not know
    try:
        while missing := [shard for shard in shards if not shard.summary.exists()]:
            num_made = sum(_take(shard, rows, parent) for shard in missing)
            if not num_made:
                time.sleep(_POLL_S)  # others have them all; should one die, its shard is free
    except OSError as error:
        pipe.send(DataError(f"token store {shards[0].table.parent} cannot be written: {error.strerror}; see token_store_dir"))
    except DataError as error:
        pipe.send(error)


def _take(shard: Shard, rows: RowReader, parent: int) -> bool:
    """Make a shard, unless someone else does or did; tell whether it was made."""
    try:
        with FileLock(shard.lock, timeout=0):
            if shard.summary.exists():
                return False
            _write(shard, rows, parent)
            return True
    except Timeout:
        return False


def _write(shard: Shard, rows: RowReader, parent: int) -> None:
    """Tokenise a shard, aside until it is complete.

    Raises:
        DataError: all of its rows are bad for one reason, which is no matter of rows.
    """
    digest = xxhash.xxh3_128()
    bad_rows: list[BadRow] = []
    notes: list[Note] = []
    num_samples = 0
    with shard.aside.open("wb") as file:
        with pa.ipc.new_stream(file, SCHEMA) as writer:
            for batch in _batches(shard, rows, parent, bad_rows):
                writer.write_batch(_record_batch(batch, digest))
                num_samples += len(batch)
                notes = join_notes([*notes, *(note for sample in batch for note in Note.of(sample))])
        file.flush()
        os.fsync(file.fileno())
    if not num_samples and len({kind_of_reason(row.reason) for row in bad_rows}) == 1:
        raise DataError(no_sample(bad_rows, rows.names))
    shard.aside.replace(shard.table)
    summary = ShardSummary(num_samples=num_samples, digest=digest.hexdigest(), bad_rows=tuple(bad_rows), notes=tuple(notes))
    shard.aside.write_text(json.dumps(asdict(summary)), encoding="utf-8")
    shard.aside.replace(shard.summary)


def _batches(shard: Shard, rows: RowReader, parent: int, bad_rows: list[BadRow]) -> Iterator[list[Sample]]:
    """Read a shard's samples, a few at a time; what is none goes to ``bad_rows``."""
    batch: list[Sample] = []
    num_tokens = 0
    for index in range(shard.start, shard.stop):
        if os.getppid() != parent:
            os._exit(1)  # the rank died: nobody would hear of a shard that fails
        row = rows[index]
        if isinstance(row, BadRow):
            bad_rows.append(row)
            continue
        batch += row
        num_tokens += sum(len(sample.tokens) for sample in row)
        if len(batch) >= _BATCH_ROWS or num_tokens >= _BATCH_TOKENS:
            yield batch
            batch, num_tokens = [], 0
    if batch:
        yield batch


def _record_batch(batch: Sequence[Sample], digest: "xxhash.xxh3_128") -> pa.RecordBatch:
    lengths = np.array([len(sample.tokens) for sample in batch], dtype=np.int32)
    tokens = np.concatenate([sample.tokens for sample in batch])
    is_target = np.concatenate([sample.is_target for sample in batch])
    for sample in batch:  # row by row, so that how rows are batched does not matter
        digest.update(np.int32(len(sample.tokens)).tobytes())
        digest.update(sample.tokens.tobytes())
        digest.update(sample.is_target.tobytes())
    offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(tokens)),
        pa.ListArray.from_arrays(offsets, pa.array(is_target)),
        pa.array(lengths),
        pa.array([sample.num_targets for sample in batch], pa.int32()),
        pa.array([sample.source for sample in batch], pa.int16()),
        pa.array([sample.row for sample in batch], pa.int32()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)
