"""A process group whose ranks may share one GPU, for tests: collectives of CUDA tensors that run on the host, over gloo.

NCCL refuses two ranks on one GPU, and gloo lacks most collectives of CUDA tensors. Here every collective is one all-gather of
host copies; each rank makes its result of them and copies it back. That is slow, and the same for every device.

Tried on an H200 with torch 2.11, and on 2.11 and 2.13 without a GPU, where host copies are the tensors themselves. It relies on
how torch lets Python stand for a process group, whose methods Python and C++ look up by name.
"""

from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Collectives that this rank took part in, by name, over all groups.
CALLS: Counter[str] = Counter()


def join_staged(init_method: str, rank: int, world_size: int, timeout: timedelta) -> None:
    """Make the default group of this process a staged one; those that are made of it later are too."""
    # Not when imported: once a backend is registered, torch treats groups of several backends differently.
    dist.Backend.register_backend("staged", StagedGroup, devices=["cpu", "cuda"])
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    dist.init_process_group("staged", init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)


class Done(dist.Work):
    """A collective that is over."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True


class StagedGroup(dist.ProcessGroup):
    """Serves what FSDP2, DTensor and this package use; anything else reaches gloo, which takes tensors on the host alone."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> None:
        super().__init__(rank, world_size)
        self._gloo = dist.ProcessGroupGloo(store, rank, world_size, timeout=timeout)
        for device in ("cpu", "cuda"):
            self._register_backend(torch.device(device), dist.ProcessGroup.BackendType.GLOO, self._gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)

    def _gather(self, tensor: Tensor) -> Tensor:
        """Give every rank's tensor on the host, ``[world_size, *tensor.shape]``."""
        host = tensor.detach().cpu().contiguous()  # waits for the stream that made it
        everyone = host.new_empty(self.size(), *host.shape)
        as_bytes = [part.view(-1).view(torch.uint8) for part in (*everyone, host)]  # gloo does not know every dtype
        self._gloo.allgather([as_bytes[:-1]], as_bytes[-1:]).wait()
        return everyone

    def _finish(self, name: str, results: dict[Tensor, Tensor]) -> Done:
        """Write what a collective gives to where the caller wants it, and wait for that: no other stream will."""
        CALLS[name] += 1
        for output, result in results.items():
            output.detach().copy_(result.reshape(output.shape))
        return Done()

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Done:
        return self._finish("all_reduce", {x: _reduce(self._gather(x), opts) for x in tensors})

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Done:
        return self._finish("broadcast", {x: self._gather(x)[opts.rootRank] for x in tensors})

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Done:
        results = [zip(parts, self._gather(x), strict=True) for parts, x in zip(outputs, inputs, strict=True)]
        return self._finish("all_gather", {part: result for pairs in results for part, result in pairs})

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Done:
        return self._finish("all_gather", {out: self._gather(x) for out, x in zip(outputs, inputs, strict=True)})

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Done:
        pairs = zip(outputs, inputs, strict=True)
        return self._finish("reduce_scatter", {out: _reduce(self._gather_own(x), opts) for out, x in pairs})

    def all_to_all_single(self, output: Tensor, x: Tensor, output_splits: list[int], input_splits: list[int], opts: Any) -> Done:
        if output_splits or input_splits:
            raise ValueError(f"all-to-all with splits {input_splits} to {output_splits}: only equal parts are supported")
        return self._finish("all_to_all", {output: self._gather_own(x)})

    def _gather_own(self, x: Tensor) -> Tensor:
        """Give what every rank has for this one, ``[world_size, len(x) / world_size, ...]``."""
        return self._gather(x.reshape(self.size(), -1))[:, self.rank()]

    def all_gather_single(self, output: Tensor, x: Tensor, opts: Any) -> Done:
        return self.all_gather_single_coalesced([output], [x], opts)

    def reduce_scatter_single(self, output: Tensor, x: Tensor, opts: Any) -> Done:
        return self.reduce_scatter_single_coalesced([output], [x], opts)

    # What torch 2.11 calls them.
    alltoall_base = all_to_all_single
    _allgather_base, allgather_into_tensor_coalesced = all_gather_single, all_gather_single_coalesced
    _reduce_scatter_base, reduce_scatter_tensor_coalesced = reduce_scatter_single, reduce_scatter_single_coalesced


def _reduce(everyone: Tensor, opts: Any) -> Tensor:
    if opts.reduceOp == dist.ReduceOp.SUM:
        return everyone.sum(0)
    if opts.reduceOp == dist.ReduceOp.AVG:
        return everyone.sum(0) / len(everyone)
    raise ValueError(f"{opts.reduceOp.op} is neither SUM nor AVG")
