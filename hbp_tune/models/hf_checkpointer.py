"""Hugging Face checkpoints part by part: each rank reads and writes only its own rows of every weight."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from hbp_tune.errors import ConfigError
from hbp_tune.models.hf_files import INDEX, SINGLE, read_headers
from hbp_tune.models.hf_weights import FAMILIES, Weight, hf_weights, pairs_of_halves
from hbp_tune.parallel.agree import from_all_ranks

# Of safetensors, by torch's types.
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Tensors of a checkpoint that are not weights, or are another one's.
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a parameter that this rank holds, ``start`` to ``stop``, and whether it is the one that writes them."""

    local: Tensor
    start: int
    stop: int
    writes: bool


class HFCheckpointer:
    """Reads a Hugging Face checkpoint into a sharded model, and exports one.

    Each rank reads its own rows of every tensor, so that no rank ever holds the model, and writes them to their places in the
    exported files, which all ranks share. Names and order of files are the checkpoint's own.

    Args:
        checkpoint_dir: holds ``model.safetensors`` or an index with the files that it names, and ``config.json``.
        output_dir: of exports, a folder ``epoch_N`` each; on a disk that all nodes share.
        export_dtype: ``bf16`` or ``fp32`` of exported weights; as they are trained where left out.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, or its family is not known.
    """

    def __init__(self, checkpoint_dir: str, output_dir: str, export_dtype: str | None = None) -> None:
        self._folder = Path(checkpoint_dir)
        self._output_dir = Path(output_dir)
        if export_dtype not in (None, "bf16", "fp32"):
            raise ConfigError(f"checkpointer.export_dtype={export_dtype} must be bf16 or fp32, or be left out")
        self._export_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(export_dtype or "")
        self._stored = read_headers(self._folder)
        self._config = _read_config(self._folder / "config.json")
        self._family = str(self._config.get("model_type"))
        if self._family not in FAMILIES:
            raise ConfigError(
                f"{self._folder / 'config.json'} has model_type={self._family}, this checkpointer knows {', '.join(FAMILIES)}; "
                f"take torchtune.training.FullModelHFCheckpointer where torchtune has the model"
            )

    def check(self, model: nn.Module) -> None:
        """Compare a model with the checkpoint, tensor by tensor, before anything is read.

        Args:
            model: perhaps on the meta device, perhaps sharded.

        Raises:
            ConfigError: a weight is missing, left over, or of another shape.
        """
        ours = model.state_dict()
        weights = hf_weights(ours, self._family)
        for name, parameter in ours.items():
            there = self._stored.get(weights[name].name)
            if there is None:
                raise ConfigError(
                    f"{self._folder} has no tensor {weights[name].name}, from which the model's {name} is read; take the "
                    f"builder of this checkpoint as model"
                )
            if there.shape != tuple(parameter.shape):
                raise ConfigError(
                    f"{weights[name].name} in {self._folder / there.file} has the shape {list(there.shape)}, the model's {name} "
                    f"{list(parameter.shape)}; take the builder of this checkpoint as model"
                )
        left = self._stored.keys() - {weight.name for weight in weights.values()}
        # Some tied checkpoints hold the embedding twice.
        left -= {name for name in left if name.endswith(_NOT_WEIGHTS) or name == "lm_head.weight"}
        if left:
            first = min(left)
            raise ConfigError(
                f"{first} in {self._folder / self._stored[first].file} and {len(left) - 1} more tensors are not in the model; "
                f"take the builder of this checkpoint as model"
            )

    def load(self, model: nn.Module, watch: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Read this rank's rows of every weight.

        Args:
            model: whose parameters have memory, in any type; sharded by rows, or whole.
            watch: called with the bytes of each tensor that was read.
        """
        ours = model.state_dict()
        weights = hf_weights(ours, self._family)
        by_file: dict[str, list[tuple[str, Tensor]]] = {}
        for name, parameter in ours.items():
            by_file.setdefault(self._stored[weights[name].name].file, []).append((name, parameter))
        for file, parameters in by_file.items():
            with safe_open(self._folder / file, framework="pt") as opened:
                for name, parameter in parameters:
                    rows, weight = _rows_of(parameter), weights[name]
                    if rows.start < rows.stop:
                        source = opened.get_slice(weight.name)
                        rows.local.copy_(_read_rows(source, rows, self._head_dim(weight)))
                    watch(rows.local.numel() * rows.local.element_size())

    def _head_dim(self, weight: Weight) -> int:
        """Give the rows of a head of a rotary weight; 1 of others."""
        if not weight.is_rotary:
            return 1
        return int(self._config.get("head_dim") or self._config["hidden_size"] // self._config["num_attention_heads"])

    def export(
        self,
        model: nn.Module,
        folder: Path,
        *,
        watch: Callable[[int], None] = lambda num_bytes: None,
        add: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Write the model's weights, all ranks together; the folder is there when all of it is written.

        An error of one rank, such as a full disk, is raised on all.

        Args:
            model: sharded by rows, or whole.
            folder: of the export; an older one gives way.
            watch: called with the bytes of each tensor that was written.
            add: called on rank 0 with the unfinished folder, to write what else belongs to it.
        """
        unfinished = folder.with_name(f"{folder.name}.tmp")
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        ours = model.state_dict()
        by_hf_name = {weight.name: (ours[name], weight) for name, weight in hf_weights(ours, self._family).items()}
        layouts = self._layouts({name: parameter for name, (parameter, _) in by_hf_name.items()})

        def create() -> None:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for file, layout in layouts.items():
                layout.create(unfinished / file)

        def write() -> None:
            for file, layout in layouts.items():
                with (unfinished / file).open("r+b", buffering=0) as stream:
                    for hf_name, place in layout.places.items():
                        parameter, weight = by_hf_name[hf_name]
                        rows = _rows_of(parameter)
                        if rows.writes:
                            _write_rows(stream.fileno(), place, rows, layout.dtype, self._head_dim(weight))
                        watch(rows.local.numel() * rows.local.element_size())
                    os.fsync(stream.fileno())

        try:
            _agreed(create if is_first else None)
            _agreed(write)
            _agreed(partial(self._finish, unfinished, layouts, folder, add) if is_first else None)
        except Exception:
            if is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _layouts(self, tensors: Mapping[str, Tensor]) -> "dict[str, _FileLayout]":
        """Say where each tensor goes, by its name there: into the file that the checkpoint had it in."""
        by_file: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            by_file.setdefault(self._stored[name].file, {})[name] = tensor
        return {file: _FileLayout.of(its, self._export_dtype) for file, its in sorted(by_file.items())}

    def _finish(self, unfinished: Path, layouts: "Mapping[str, _FileLayout]", folder: Path, add: Callable[[Path], None]) -> None:
        """Add the index, the checkpoint's small files and what else there is, and give the folder its name."""
        if set(layouts) != {SINGLE}:
            total = sum(layout.size for layout in layouts.values())
            weight_map = {name: file for file, layout in layouts.items() for name in layout.places}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (unfinished / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for path in self._folder.iterdir():
            if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != INDEX:
                shutil.copy(path, unfinished / path.name)
        add(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class _FileLayout:
    """A file of safetensors before its data are written.

    Args:
        header: all that stands before the data.
        places: where each tensor's data begin, in bytes of the file.
        size: of the data, in bytes.
        dtype: of all tensors; as they are where None.
    """

    header: bytes
    places: Mapping[str, int]
    size: int
    dtype: torch.dtype | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> "_FileLayout":
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            kind = dtype or tensor.dtype
            begin, end = end, end + tensor.numel() * kind.itemsize
            entries[name] = {"dtype": _DTYPES[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        places = {name: len(header) + entries[name]["data_offsets"][0] for name in tensors}
        return cls(header=header, places=places, size=end, dtype=dtype)

    def create(self, path: Path) -> None:
        """Write the header, and take the space of the data."""
        with path.open("wb") as stream:
            stream.write(self.header)
            stream.truncate(len(self.header) + self.size)


def _read_config(path: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ConfigError: it is not there, or not JSON.
    """
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); checkpoint_dir must be a Hugging Face checkpoint's folder"
        ) from error
    return config


def _agreed(work: Callable[[], None] | None) -> None:
    """Do this rank's part, and learn of the first error of any rank; collective where there are several."""
    error: Exception | None = None
    try:
        if work:
            work()
    except Exception as caught:
        error = caught
    if dist.is_initialized():
        error = next((each for each in from_all_ranks(error) if each), None)
    if error:
        raise error


def _rows_of(parameter: Tensor) -> _Rows:
    """Find the rows of a parameter that this rank holds; of copies the first one writes.

    Raises:
        ConfigError: it is sharded in another way than by rows.
    """
    data = parameter.detach()
    if not isinstance(data, DTensor):
        return _Rows(data, 0, len(data), not dist.is_initialized() or dist.get_rank() == 0)
    start, stop, writes = 0, len(data), True
    for dim, placement in enumerate(data.placements):
        coordinate = data.device_mesh.get_local_rank(dim)
        if placement == Shard(0):
            per_rank = -(-(stop - start) // data.device_mesh.size(dim))  # as torch.chunk cuts
            start, stop = min(start + coordinate * per_rank, stop), min(start + (coordinate + 1) * per_rank, stop)
        elif placement == Replicate():
            writes = writes and coordinate == 0
        else:
            raise ConfigError(f"weights are sharded as {data.placements}; only shards of rows can be read and written")
    return _Rows(data.to_local(), start, stop, writes)


def _heads(rows: _Rows, head_dim: int) -> tuple[int, int]:
    """Give the rows of all heads that some rows belong to."""
    return rows.start // head_dim * head_dim, -(-rows.stop // head_dim) * head_dim


def _read_rows(source: Any, rows: _Rows, head_dim: int) -> Tensor:
    if head_dim == 1:
        return cast(Tensor, source[rows.start : rows.stop])
    first, last = _heads(rows, head_dim)
    return pairs_of_halves(source[first:last], head_dim)[rows.start - first : rows.stop - first]


def _write_rows(file: int, place: int, rows: _Rows, dtype: torch.dtype | None, head_dim: int) -> None:
    """Write rows to their place in a file; of rotary weights row by row, as neighbours here are half a head apart there."""
    if rows.start == rows.stop:
        return
    local = rows.local.to(device="cpu", dtype=dtype or rows.local.dtype).contiguous()
    row_bytes = local[0].numel() * local.element_size()
    data = memoryview(local.view(torch.uint8).flatten().numpy() if local.ndim else local.numpy())  # type: ignore[arg-type]
    for begin, end, target in _runs(rows, head_dim):
        _write_all(file, data[(begin - rows.start) * row_bytes : (end - rows.start) * row_bytes], place + target * row_bytes)


def _runs(rows: _Rows, head_dim: int) -> Iterator[tuple[int, int, int]]:
    """Give runs of our rows, and the row of the file that each begins at."""
    if head_dim == 1:
        yield rows.start, rows.stop, rows.start
        return
    for row in range(rows.start, rows.stop):
        head, inside = divmod(row, head_dim)
        yield row, row + 1, head * head_dim + inside % 2 * (head_dim // 2) + inside // 2


def _write_all(file: int, data: memoryview, place: int) -> None:
    while len(data):
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written
