"""`PackBatch`: one rank's tensors of one pack, what one forward and backward sees."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.planning.plans.sharding import CpDegrees, PackPart


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Spans:
    """Which keys each query attends to: runs of queries, each causal over its own keys, aligned at the bottom right.

    Args:
        cu_seqlens_q: ``int32[runs + 1]``, where each run's queries start.
        cu_seqlens_k: ``int32[runs + 1]``, where each run's keys start; the same tensor where queries are the keys.
        query_lens: the runs' queries, on the host, so that no kernel waits for the device.
        key_lens: the runs' keys, on the host.
        key_rows: ``int64[keys]``, where all-gathered keys lie, see `PackPart`; None where a rank's own rows are the keys.
        gathered_len: rows whose keys and values each gather rank gives to the others.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
    key_rows: Tensor | None = None
    gathered_len: int = 0

    @classmethod
    def of_part(cls, part: PackPart) -> "Spans":
        """Make the spans of one part of a pack."""
        cu_seqlens_q = _cumulative(part.query_lens)
        return cls(
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_q if part.key_rows is None else _cumulative(part.key_lens),
            query_lens=tuple(part.query_lens.tolist()),
            key_lens=tuple(part.key_lens.tolist()),
            key_rows=None if part.key_rows is None else torch.from_numpy(part.key_rows),
            gathered_len=part.gathered_len,
        )

    def of_runs(self, first: int, end: int) -> "Spans":
        """Take neighbouring runs alone, from ``first`` to before ``end``, whose keys have been gathered."""
        cu_seqlens_q = self.cu_seqlens_q[first : end + 1] - self.cu_seqlens_q[first]
        is_self = self.cu_seqlens_k is self.cu_seqlens_q
        return Spans(
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_q if is_self else self.cu_seqlens_k[first : end + 1] - self.cu_seqlens_k[first],
            query_lens=self.query_lens[first:end],
            key_lens=self.key_lens[first:end],
        )

    def map(self, change: Callable[[Any], Any]) -> "Spans":
        """Change every tensor."""
        cu_seqlens_q = change(self.cu_seqlens_q)
        return replace(
            self,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_q if self.cu_seqlens_k is self.cu_seqlens_q else change(self.cu_seqlens_k),
            key_rows=None if self.key_rows is None else change(self.key_rows),
        )


def _cumulative(lens: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lens))).astype(np.int32))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackBatch:
    """One rank's rows of one pack (a micro-step).

    Args:
        tokens: ``int64[1, local_len]``; 0 on padding.
        labels: ``int64[1, local_len]``, the next token inside each document; -100 where it does not count.
        input_pos: ``int64[1, local_len]``, positions that restart at 0 in each document.
        loss_weights: ``float32[1, local_len]``, what each label weighs in the loss of the step; 0 where it does not count.
        spans: what the rank attends to, of its whole part of the pack (of the whole pack where keys are not gathered).
        degrees: how the group's ranks divide attention over this pack.
        num_tokens: real tokens of the whole pack.
        step: optimizer step within the epoch.
        is_last_micro_step: the optimizer steps after this batch.
        classes: ``int64[1, local_len]``, what validation tells rows apart by; None in training.
    """

    tokens: Tensor
    labels: Tensor
    input_pos: Tensor
    loss_weights: Tensor
    spans: Spans
    degrees: CpDegrees
    group: PackingGroup
    num_tokens: int
    step: int
    is_last_micro_step: bool
    classes: Tensor | None = None

    def to(self, device: torch.device) -> "PackBatch":
        """Copy the tensors to a device, without waiting for it."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackBatch":
        """Copy the tensors to page-locked memory; the data loader calls this where there is a CUDA device."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes by value: torch passes each tensor by a file of its own, which costs .3 ms a tensor."""
        arrays = self._map(Tensor.numpy)
        return _from_arrays, ({field.name: getattr(arrays, field.name) for field in fields(arrays)},)

    def _map(self, change: Callable[[Any], Any]) -> "PackBatch":
        return replace(
            self,
            tokens=change(self.tokens),
            labels=change(self.labels),
            input_pos=change(self.input_pos),
            loss_weights=change(self.loss_weights),
            spans=self.spans.map(change),
            classes=None if self.classes is None else change(self.classes),
        )


def _from_arrays(values: dict[str, Any]) -> PackBatch:
    return PackBatch(**values)._map(torch.from_numpy)
