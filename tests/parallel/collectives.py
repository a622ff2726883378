"""Counting what ranks send each other, and letting CPU ranks take the path of CUDA ranks."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import placement_types
from torch.utils._python_dispatch import TorchDispatchMode


def collective_name(func: Any) -> str | None:
    """The name of an operator that communicates; waiting and wrapping move nothing."""
    namespace, name = func.name().partition(".")[0].split("::")
    is_one = namespace in ("_c10d_functional", "_dtensor") and name not in ("wait_tensor", "_wrap_tensor_autograd")
    return name if is_one else None


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives by name, and the elements that this rank receives from others in them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.received = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if name := collective_name(func):
            assert isinstance(args[0], Tensor)
            sent = args[0].numel()
            if name == "all_gather_into_tensor":
                self.received += out.numel() - sent
            elif name == "reduce_scatter_tensor":
                self.received += sent - out.numel()
            elif name == "shard_dim_alltoall":
                self.received += sent - sent / torch.distributed.get_world_size(_group(args[3]))
            else:
                raise AssertionError(f"unexpected collective {func.name()}")
            self.calls[name] += 1
        return out


def _group(group: Any) -> Any:
    return torch.distributed.distributed_c10d._resolve_process_group(group) if isinstance(group, str) else group


@contextmanager
def cuda_all_to_all() -> Iterator[None]:
    """Let DTensor trade shards by the operator of CUDA meshes; on CPU meshes it gathers everything instead."""
    plain = placement_types.shard_dim_alltoall

    def trade(x: Tensor, gather_dim: int, shard_dim: int, mesh: Any, mesh_dim: int) -> Tensor:
        group = mesh.get_group(mesh_dim)
        try:
            return torch.ops._dtensor.shard_dim_alltoall(x, gather_dim, shard_dim, group.group_name)
        except RuntimeError:  # newer torch takes the group itself
            return torch.ops._dtensor.shard_dim_alltoall(x, gather_dim, shard_dim, group)

    placement_types.shard_dim_alltoall = trade
    try:
        yield
    finally:
        placement_types.shard_dim_alltoall = plain
