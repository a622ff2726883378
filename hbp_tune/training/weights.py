"""Weights into a sharded model and out of it, by our checkpointer or by one of torchtune's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from hbp_tune.models.hf_checkpointer import HFCheckpointer


def load_weights(
    checkpointer: HFCheckpointer, model: nn.Module, device: torch.device, dtype: torch.dtype, *, cpu_offload: bool
) -> None:
    """Give a model on the meta device memory, and read this rank's rows of the checkpoint into it.

    Args:
        checkpointer: of the checkpoint.
        model: sharded.
        device: of this rank.
        dtype: of rotary tables.
        cpu_offload: whether weights stay in host memory.
    """
    model.to_empty(device="cpu" if cpu_offload else device)
    init_positions(model, device, dtype)
    num_bytes = sum(parameter.to_local().nbytes for parameter in cast(Any, model.parameters()))
    with _progress("Loading weights", num_bytes) as watch:
        checkpointer.load(model, watch)


def init_positions(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make the rotary tables: positions are not weights, so that no checkpoint has them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            for module in model.modules():
                if hasattr(module, "rope_init"):
                    cast(Any, module).rope_init()
    finally:
        torch.set_default_dtype(before)


def export_rows(checkpointer: HFCheckpointer, model: nn.Module, folder: Path, add: Callable[[Path], None]) -> None:
    """Write this rank's rows of the weights to an export; collective. See `HFCheckpointer.export`."""
    num_bytes = sum(parameter.to_local().nbytes for parameter in cast(Any, model.parameters()))
    with _progress("Exporting weights", num_bytes) as watch:
        checkpointer.export(model, folder, watch=watch, add=add)


@contextmanager
def _progress(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of rank 0, whose part is as large as any other's."""
    hidden = None if dist.get_rank() == 0 else True  # None: where there is a terminal
    with tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, disable=hidden) as bar:
        yield lambda size: bar.update(size) and None
