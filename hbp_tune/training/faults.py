"""What goes wrong inside a step: a loss or gradient that is not finite, and memory that does not suffice."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hbp_tune.data.batches.batch import PackBatch
from hbp_tune.errors import NonFiniteError, OutOfMemoryError
from hbp_tune.parallel.agree import from_all_ranks
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from hbp_tune.reporting.places import Places

_NAMED_SAMPLES = 20


class StepGuard:
    """Keeps the losses of a step's packs, and counts the steps that are not applied.

    Args:
        max_nonfinite_steps: steps of the run that may be skipped; one more ends it.
        skipped_steps: those that were, before this start of the run.
    """

    def __init__(self, *, max_nonfinite_steps: int = 3, skipped_steps: int = 0) -> None:
        self._max_nonfinite_steps = max_nonfinite_steps
        self.skipped_steps = skipped_steps
        self._losses: list[Tensor] = []

    def start_step(self) -> None:
        """Forget the losses of the last step."""
        self._losses.clear()

    def add(self, loss: Tensor) -> None:
        """Take a micro-step's loss, ``float32[]``; it stays on the device, so that nothing waits for it."""
        self._losses.append(loss.detach())

    def loss_sum(self) -> Tensor:
        """Sum this rank's losses of the step, ``float32[]``."""
        return torch.stack(self._losses).sum()

    def skip(self, loss: float, grad_norm: float, plan: EpochPlan, epoch_step: int, places: Places) -> str:
        """Count a step that is not applied. Collective: every rank skips the same steps.

        Args:
            loss: of the whole step.
            grad_norm: of all gradients, before clipping.
            plan: of the epoch.
            epoch_step: the step within it.
            places: gives the rows that samples come from.

        Returns:
            A line that says why.

        Raises:
            NonFiniteError: it is one too many; names the samples of the packs whose own loss is not finite, or, where
                every pack's is, of the whole step.
        """
        self.skipped_steps += 1
        if self.skipped_steps <= self._max_nonfinite_steps:
            return (
                f"loss {loss}, gradient norm {grad_norm}; it is number {self.skipped_steps} of "
                f"max_nonfinite_steps={self._max_nonfinite_steps}"
            )
        indices = plan.indices_for_rank(dist.get_rank(), first_step=epoch_step, last_step=epoch_step + 1)
        mine = [int(index) for index, loss in zip(indices, self._losses, strict=True) if not math.isfinite(loss.item())]
        packs = sorted({index for indices_of_rank in from_all_ranks(mine) for index in indices_of_rank})
        what = f"{len(packs)} packs with a loss that is not finite" if packs else "the step (each pack's loss is finite)"
        packs = packs or np.flatnonzero(plan.pack_step == epoch_step).tolist()
        offsets = plan.pack_offsets
        sample_ids = np.concatenate([plan.sample_ids[offsets[pack] : offsets[pack + 1]] for pack in packs])
        raise NonFiniteError(
            f"loss or gradient norm was not finite in {self.skipped_steps} steps of the run, max_nonfinite_steps="
            f"{self._max_nonfinite_steps} may be skipped. In the last one, the samples of {what} are "
            f"{_describe_samples(sample_ids, places)}. Look at these rows, lower the learning rate or clip_grad_norm, or "
            f"raise max_nonfinite_steps; progress of before is kept"
        )


def _describe_samples(sample_ids: NDArray[np.int32], places: Places) -> str:
    """Name samples by id and place."""
    different = np.unique(sample_ids)
    named, more = different[:_NAMED_SAMPLES], max(0, len(different) - _NAMED_SAMPLES)
    listed = ", ".join(f"{sample_id} ({place})" for sample_id, place in zip(named.tolist(), places(named), strict=True))
    return listed + (f" and {more} more" if more else "")


@contextlib.contextmanager
def explain_out_of_memory(batch: PackBatch, *, num_layers: int) -> Iterator[None]:
    """Turn running out of memory inside forward or backward into an error that names the pack and the way out.

    Args:
        batch: what runs.
        num_layers: of the model.

    Raises:
        OutOfMemoryError: there was not enough memory, on this rank; the others may have had enough.
        RuntimeError: any other error, as it came.
    """
    try:
        yield
    except RuntimeError as error:
        is_cuda = isinstance(error, torch.OutOfMemoryError)
        if not is_cuda and "can't allocate memory" not in str(error):  # of torch's allocator for host memory
            raise
        group, reason = batch.group, str(error).strip().splitlines()[0]
        advice = next_memory_setting(group, world_size=dist.get_world_size(), num_layers=num_layers, is_cuda=is_cuda)
        raise OutOfMemoryError(
            f"rank {dist.get_rank()} ran out of memory in step {batch.step + 1} of the epoch: group {group.name!r}, pack_len="
            f"{group.pack_len} ({batch.num_tokens} tokens in this pack), cp_degree={group.cp_degree}, "
            f"ac_layers={group.ac_layers} of {num_layers}, ac_mode={group.ac_mode}. Next to try: {advice}. ({reason[:300]})"
        ) from error


def next_memory_setting(group: PackingGroup, *, world_size: int, num_layers: int, is_cuda: bool) -> str:
    """Give the next setting that saves memory: what costs the least time first."""
    if group.ac_layers < num_layers:
        more = min(num_layers, max(group.ac_layers + 1, group.ac_layers + num_layers // 4))
        return f"ac_layers={more} in this group, up to {num_layers}"
    doubled = 2 * group.cp_degree
    if world_size % doubled == 0 and group.pack_len % (2 * doubled) == 0:
        return f"cp_degree={doubled} in this group"
    if is_cuda and group.ac_mode != "offload":
        return "ac_mode=offload in this group"
    return "a shorter pack_len in this group" + (", or fsdp_cpu_offload=True" if is_cuda else "")
