"""A plan as files: every placed sample in ``plan.parquet``, the figures in ``plan.json``."""

import base64
import binascii
import dataclasses
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hbp_tune.errors import DataError
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from hbp_tune.reporting.report import PlanReport, describe_groups

_FORMAT = 2
_PLAN_KEY = b"hbp_tune.plan"
_IDS_KEY = b"hbp_tune.plan_ids"

# Rows are made and compressed this many at a time, which bounds the memory beside the plan to some 100 MB.
_ROWS_AT_ONCE = 1 << 20

# All are required (never null), so that they come back as plain integers.
_SCHEMA = pa.schema(
    [
        pa.field("epoch", pa.int16(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("micro_step", pa.int16(), nullable=False),
        pa.field("group", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("pack_len", pa.int32(), nullable=False),
        pa.field("cp_degree", pa.int16(), nullable=False),
        pa.field("first_rank", pa.int32(), nullable=False),
        pa.field("pack", pa.int32(), nullable=False),
        pa.field("slot", pa.int32(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Epoch:
    hash: str
    dropped: NDArray[np.int32]
    truncated: NDArray[np.int32]
    cut: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Metadata:
    groups: tuple[PackingGroup, ...]
    world_size: int
    epochs: list[_Epoch]


def write_plan(path: Path, plans: Sequence[EpochPlan]) -> None:
    """Write the plans of a run, one per epoch, as one parquet file that any reader of parquet understands.

    One row per placed sample, in training order; within a pack, in pack order. Columns:

    - ``epoch`` int16: 0 is the first.
    - ``step`` int32: optimizer step within the epoch.
    - ``micro_step`` int16: accumulation step within the optimizer step.
    - ``group`` dictionary-encoded string: name of the packing group that the pack belongs to.
    - ``pack_len`` int32: tokens that a pack of this group can hold, over all its ranks.
    - ``cp_degree`` int16: ranks that share the pack.
    - ``first_rank`` int32: the pack runs on ranks ``first_rank .. first_rank + cp_degree - 1``.
    - ``pack`` int32: index of the pack within its epoch. Empty packs, which ranks without work hold, count but have no row.
    - ``slot`` int32: position of the sample inside the pack, from 0.
    - ``sample`` int32: the sample's id, its row in the data.
    - ``length`` int32: its tokens as trained; truncated samples are shorter than stored.

    The schema's metadata holds groups with their recomputation, world size, number of packs and hash of each epoch as
    JSON, and beside it the ids of dropped and truncated samples.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = _SCHEMA.with_metadata(_metadata(plans))
    # Ids hardly repeat, so that a dictionary of them would only cost time.
    repeating = [name for name in _SCHEMA.names if name != "sample"]
    with pq.ParquetWriter(path, schema, compression="zstd", compression_level=1, use_dictionary=repeating) as writer:
        for batch in _batches(plans, schema):
            writer.write_batch(batch, row_group_size=_ROWS_AT_ONCE)


def plan_table(plans: Sequence[EpochPlan]) -> pa.Table:
    """Give the rows that `write_plan` writes, with the same columns, as one table."""
    return pa.Table.from_batches(_batches(plans, _SCHEMA), schema=_SCHEMA)


def _batches(plans: Sequence[EpochPlan], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for epoch, plan in enumerate(plans):
        for columns in _columns(plan, epoch):
            names = pa.array([group.name for group in plan.groups], pa.string())
            group = pa.DictionaryArray.from_arrays(pa.array(columns.pop("group")), names)
            arrays = [group if name == "group" else pa.array(columns[name]) for name in _SCHEMA.names]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def read_plan(path: Path) -> tuple[EpochPlan, ...]:
    """Read the plans that `write_plan` wrote, one per epoch, and verify that they are still the same.

    Raises:
        DataError: there is no such file, it is not a plan, or it was changed since it was written.
    """
    table = _read_table(path)
    metadata = _read_metadata(path, table.schema.metadata or {})
    rows = _read_columns(path, table, metadata)
    bounds = np.searchsorted(rows["epoch"], np.arange(len(metadata.epochs) + 1))
    difference = "" if bounds[0] == 0 and bounds[-1] == table.num_rows else "it has rows of other epochs"
    plans: list[EpochPlan] = []
    for epoch, written in enumerate(metadata.epochs):
        mine = {name: column[bounds[epoch] : bounds[epoch + 1]] for name, column in rows.items()}
        plans.append(_rebuild(mine, metadata, written))
        difference = difference or _find_difference(plans[-1], epoch, mine, written.hash)
        if difference:
            raise DataError(f"{path} was changed after it was written: {difference}; restore it, or plan again")
    return tuple(plans)


def plan_summary(report: PlanReport) -> dict[str, Any]:
    """Give the figures of a report as plain values for JSON; a figure that does not exist is ``None``.

    ``num_samples`` and ``num_tokens`` count what the first epoch trains; dropped samples are not among them.
    """
    plan = report.plan
    hashes = [epoch.hash for epoch in report.plans]
    return {
        "headline": report.headline,
        "warnings": list(report.warnings),
        "lengths_from": report.lengths_from,
        "world_size": plan.world_size,
        "num_samples": len(plan.sample_ids),
        "num_tokens": int(plan.lengths.sum(dtype=np.int64)),
        "num_steps": plan.num_steps,
        "dropped": len(plan.dropped),
        "truncated": len(plan.truncated),
        "metrics": _finite(dataclasses.asdict(report.metrics)),
        "baselines": {name: _finite(dataclasses.asdict(metrics)) for name, metrics in report.baselines.items()},
        "groups": [_finite(dataclasses.asdict(group)) for group in describe_groups(plan)],
        "seconds": _finite(dict(report.seconds)),
        "hash": hashes[0],
        "hashes": hashes,
    }


def write_summary(path: Path, report: PlanReport) -> None:
    """Write `plan_summary` as strict JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plan_summary(report), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Put ``None`` where JSON has no number."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def _columns(plan: EpochPlan, epoch: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the columns of one epoch, some rows at a time; ``group`` as index."""
    packs = np.repeat(np.arange(plan.num_packs, dtype=np.int32), np.diff(plan.pack_offsets))
    pack_lens = np.array([group.pack_len for group in plan.groups], dtype=np.int32)
    cp_degrees = np.array([group.cp_degree for group in plan.groups], dtype=np.int16)
    for start in range(0, len(packs), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        pack = packs[rows]
        group = plan.pack_group[pack]
        yield {
            "epoch": np.full(len(pack), epoch, dtype=np.int16),
            "step": plan.pack_step[pack],
            "micro_step": plan.pack_micro_step[pack],
            "group": group.astype(np.int32),
            "pack_len": pack_lens[group],
            "cp_degree": cp_degrees[group],
            "first_rank": plan.pack_first_rank[pack],
            "pack": pack,
            "slot": (np.arange(start, start + len(pack)) - plan.pack_offsets[pack]).astype(np.int32),
            "sample": plan.sample_ids[rows],
            "length": plan.lengths[rows],
        }


def _metadata(plans: Sequence[EpochPlan]) -> dict[bytes, bytes]:
    first = plans[0]
    assert all(plan.groups == first.groups and plan.world_size == first.world_size for plan in plans), "epochs of one run"
    ids: list[str] = []  # epochs leave out the same samples as a rule, so that each list is stored once
    epochs = []
    for plan in plans:
        packed = {"dropped": _pack_ids(plan.dropped), "truncated": _pack_ids(plan.truncated)}
        ids += [text for text in dict.fromkeys(packed.values()) if text not in ids]
        left_out = {what: ids.index(text) for what, text in packed.items()}
        epochs.append({"hash": plan.hash, "num_packs": plan.num_packs, "cut": plan.cut, **left_out})
    groups = [dataclasses.asdict(group) for group in first.groups]
    described = {"format": _FORMAT, "world_size": first.world_size, "groups": groups, "epochs": epochs}
    return {_PLAN_KEY: json.dumps(described, ensure_ascii=False).encode(), _IDS_KEY: json.dumps(ids).encode()}


def _pack_ids(ids: NDArray[np.int32]) -> str:
    """Pack ids by their differences, which are small; as text, because readers of parquet take metadata for UTF-8."""
    return base64.b64encode(zlib.compress(np.diff(ids, prepend=np.int32(0)).astype("<i4").tobytes())).decode()


def _unpack_ids(text: str) -> NDArray[np.int32]:
    return np.cumsum(np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i4"), dtype=np.int32)


def _read_table(path: Path) -> pa.Table:
    """Read the whole file.

    Raises:
        DataError: there is none, or it is something else.
    """
    if path.is_dir():
        raise DataError(f"plan {path} is a folder; name the file in it, such as {path / 'plan.parquet'}")
    try:
        return pq.ParquetFile(path).read()
    except FileNotFoundError as error:
        raise DataError(f"there is no plan at {path}; check the path, or plan again to write it") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file, or a damaged one ({error}); plan again to write it") from error


def _read_metadata(path: Path, metadata: Mapping[bytes, bytes]) -> _Metadata:
    """Read what belongs to the whole file.

    Raises:
        DataError: the file is not a plan, one of another version, or its metadata are damaged.
    """
    if _PLAN_KEY not in metadata or _IDS_KEY not in metadata:
        raise DataError(f"{path} is parquet, but no plan: its schema has no {_PLAN_KEY.decode()!r}; plan again to write one")
    try:
        plan = json.loads(metadata[_PLAN_KEY])
        if plan["format"] != _FORMAT:
            raise DataError(f"{path} holds a plan of format {plan['format']}, this version reads {_FORMAT}; plan again")
        ids = [_unpack_ids(text) for text in json.loads(metadata[_IDS_KEY])]
        return _Metadata(
            groups=tuple(PackingGroup(**group) for group in plan["groups"]),
            world_size=plan["world_size"],
            epochs=[
                _Epoch(hash=epoch["hash"], dropped=ids[epoch["dropped"]], truncated=ids[epoch["truncated"]], cut=epoch["cut"])
                for epoch in plan["epochs"]
            ],
        )
    except (json.JSONDecodeError, binascii.Error, zlib.error, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: the metadata of the plan cannot be read ({error!r}); plan again") from error


def _read_columns(path: Path, table: pa.Table, metadata: _Metadata) -> dict[str, NDArray[Any]]:
    """Give the columns as integers; ``group`` as index, -1 for a name that is not a group's.

    Raises:
        DataError: a column is missing or has another type.
    """
    for field in _SCHEMA:
        if field.name not in table.schema.names:
            raise DataError(f"{path} has no column {field.name!r}: it is not a whole plan; plan again")
        found = table.schema.field(field.name)
        if not found.equals(field):
            raise DataError(f"{path}: column {field.name!r} is {found.type}, not {field.type} without nulls; plan again")
    columns = {name: table.column(name).to_numpy() for name in _SCHEMA.names if name != "group"}
    group = table.column("group").unify_dictionaries()
    index_of = {group.name: index for index, group in enumerate(metadata.groups)}
    columns["group"] = np.empty(0, dtype=np.int32)
    if group.num_chunks:
        indices = np.concatenate([chunk.indices.to_numpy() for chunk in group.chunks])
        columns["group"] = np.array([index_of.get(name, -1) for name in group.chunk(0).dictionary.to_pylist()])[indices]
    return columns


def _rebuild(rows: Mapping[str, NDArray[Any]], metadata: _Metadata, written: _Epoch) -> EpochPlan:
    """Derive the packs from the rows; an empty pack has none, but a micro-step has at least one and a known number of packs."""
    is_first = np.diff(rows["step"], prepend=-1) != 0
    is_first |= np.diff(rows["micro_step"], prepend=-1) != 0
    first_rows = np.flatnonzero(is_first)  # of each micro-step
    cp_degree = np.array([group.cp_degree for group in metadata.groups])[rows["group"][first_rows]]
    num_packs = metadata.world_size // cp_degree
    replica = np.arange(num_packs.sum()) - np.repeat(np.cumsum(num_packs) - num_packs, num_packs)
    pack_group, pack_step, pack_micro_step = (
        np.repeat(rows[name][first_rows], num_packs) for name in ("group", "step", "micro_step")
    )
    return EpochPlan(
        groups=metadata.groups,
        world_size=metadata.world_size,
        sample_ids=rows["sample"],
        lengths=rows["length"],
        pack_offsets=np.searchsorted(rows["pack"], np.arange(len(replica) + 1)).astype(np.int64),
        pack_group=pack_group.astype(np.int16),
        pack_step=pack_step.astype(np.int32),
        pack_micro_step=pack_micro_step.astype(np.int16),
        pack_first_rank=(replica * np.repeat(cp_degree, num_packs)).astype(np.int32),
        dropped=written.dropped,
        truncated=written.truncated,
        cut=written.cut,
    )


def _find_difference(plan: EpochPlan, epoch: int, rows: Mapping[str, NDArray[Any]], written_hash: str) -> str:
    """Say how the rows differ from those that were written, or nothing."""
    if (found := plan.hash) != written_hash:
        return f"epoch {epoch} has hash {found[:12]}, written was {written_hash[:12]}"
    start = 0
    for columns in _columns(plan, epoch):  # some follow from others, so that the hash does not show a change of theirs
        stop = start + len(columns["sample"])
        for name, column in columns.items():
            if not np.array_equal(rows[name][start:stop], column):
                return f"column {name!r} of epoch {epoch} is not what follows from the others"
        start = stop
    return ""
