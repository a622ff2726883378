"""`PackBatch`: one rank's tensors of one pack, what one forward and backward sees."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hbp_tune.components.planning.records import PackingGroup

# Label of tokens that do not count toward the loss: torch's default for cross_entropy, and torchtune's.
IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackBatch:
    """One rank's rows of one pack (a micro-step).

    Args:
        tokens: ``int64[1, local_len]``; 0 on padding.
        labels: ``int64[1, local_len]``, the next token inside each document; -100 where it does not count.
        input_pos: ``int64[1, local_len]``, positions that restart at 0 in each document.
        loss_weights: ``float32[1, local_len]``, what each label weighs in the loss of the step; 0 where it does not count.
        cu_seqlens: ``int32[num_docs + 1]`` over the *whole* pack, padding being one more document.
        doc_lens: the same documents' lengths, on the host.
        num_tokens: real tokens of the whole pack.
        step: optimizer step within the epoch.
        is_last_micro_step: the optimizer steps after this batch.
    """

    tokens: Tensor
    labels: Tensor
    input_pos: Tensor
    loss_weights: Tensor
    cu_seqlens: Tensor
    doc_lens: tuple[int, ...]
    group: PackingGroup
    num_tokens: int
    step: int
    is_last_micro_step: bool

    def to(self, device: torch.device) -> "PackBatch":
        """Copy the tensors to a device, without waiting for it."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackBatch":
        """Copy the tensors to page-locked memory; the data loader calls this where there is a CUDA device."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PackBatch":
        return replace(
            self,
            tokens=change(self.tokens),
            labels=change(self.labels),
            input_pos=change(self.input_pos),
            loss_weights=change(self.loss_weights),
            cu_seqlens=change(self.cu_seqlens),
        )
