"""Measures packing groups on this machine: seconds, memory, and the fewest recomputed layers that fit."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from hbp_tune.data.batches.dataset import Layout
from hbp_tune.data.batches.made import random_batch
from hbp_tune.parallel.parallelize import GroupSwitch
from hbp_tune.planning.costs.measurements import Measurement
from hbp_tune.planning.plans.records import PackingGroup

GIB = 2**30
# Layers fewer than all in the second memory probe: the line through both says what one layer needs.
_PROBED_LAYERS = 2


class GroupMeter:
    """Runs groups with random tokens; every rank must call it with equal arguments.

    On CUDA memory is the allocator's peak. On a CPU it is counted: this rank's weights, gradients and optimizer states, and what
    autograd saves in the forward; gathered weights and what a backward holds for a moment are left out.

    Args:
        model: after every parallel technique, its gradients and its optimizer's states allocated.
        layers: of the model.
        switch: to groups.
        layout: of packs.
        vocab_size: random tokens are below it.
        device: of this rank.
        repeats: micro-steps whose median counts, after one to warm up.
        states_gib: of this rank: weights, gradients and optimizer states.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        switch: GroupSwitch,
        layout: Layout,
        *,
        vocab_size: int,
        device: torch.device,
        repeats: int,
        states_gib: float,
    ) -> None:
        self._model, self._layers, self._switch, self._layout = model, layers, switch, layout
        self._vocab_size, self._device, self._repeats, self._states_gib = vocab_size, device, repeats, states_gib

    def measure(self, group: PackingGroup, doc_lens: Sequence[int]) -> Measurement:
        """Run micro-steps of one group, whose packs all hold documents of these lengths.

        All ranks have the same shapes and are taken to run out of memory in the same place; whether one did they ask after every
        micro-step. FSDP2 is then left in the middle of a backward, and only another model and meter measure again.
        """
        step = partial(self._micro_step, group, tuple(doc_lens))
        seconds: list[float] = []
        peak_gib = self._over_ranks(partial(self._peak_gib, step))
        while len(seconds) < self._repeats and math.isfinite(sum(seconds) + peak_gib):
            seconds.append(self._over_ranks(partial(self._timed, step)))
        fits = math.isfinite(sum(seconds) + peak_gib)
        return Measurement(
            group=group,
            world_size=dist.get_world_size(),
            doc_lens=tuple(doc_lens),
            micro_step_s=statistics.median(seconds) if fits else None,
            peak_gib=peak_gib if fits else None,
        )

    def _over_ranks(self, run: Callable[[], float]) -> float:
        """Give the largest result of any rank; infinite where one ran out of memory."""
        try:
            mine = run()
        except torch.OutOfMemoryError:
            mine = math.inf
        most = torch.tensor(mine, device=self._device, dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most.item()

    def _micro_step(self, group: PackingGroup, doc_lens: tuple[int, ...]) -> Iterator[None]:
        """Run a forward, stop for whoever counts what it saved, and run the backward."""
        degrees = self._layout(group.cp_degree, doc_lens, group.pack_len)
        cp_rank = dist.get_rank() % group.cp_degree
        batch = random_batch(doc_lens, group, self._vocab_size, degrees=degrees, cp_rank=cp_rank).to(self._device)
        context = self._switch.activate(batch)
        loss: Tensor = self._model(
            batch.tokens, mask=context, input_pos=batch.input_pos, labels=batch.labels, loss_weights=batch.loss_weights
        )
        yield
        loss.backward()  # adds to gradients, which stay, as between micro-steps of training

    def _peak_gib(self, step: Callable[[], Iterator[None]]) -> float:
        """Give the most memory that this rank holds in a micro-step."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._timed(step)
            return torch.cuda.max_memory_allocated(self._device) / GIB
        with _saved_bytes(self._layers) as saved:
            run = step()
            next(run)
        activations_gib = sum(saved.values()) / GIB
        for _ in run:
            pass
        return self._states_gib + activations_gib

    def _timed(self, step: Callable[[], Iterator[None]]) -> float:
        """Give the seconds of a micro-step, all of it done on the device, from when all ranks begin."""
        dist.barrier()
        start = time.perf_counter()
        for _ in step():
            pass
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start


@contextlib.contextmanager
def _saved_bytes(layers: Sequence[nn.Module]) -> Iterator[dict[int, int]]:
    """Count the storages that autograd saves, and the inputs of layers, which checkpoints keep past its hooks."""
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage is freed and its place taken by another

    def keep(tensor: Tensor) -> Tensor:
        source = tensor if tensor._base is None else tensor._base
        if not (source.is_leaf and source.requires_grad):  # weights, transposed ones too, are counted by themselves
            kept.append(tensor)
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        keep(args[0])

    handles = [layer.register_forward_pre_hook(keep_input) for layer in layers]
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            yield saved
    finally:
        for handle in handles:
            handle.remove()


def states_gib(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Count this rank's weights, gradients (as many bytes) and optimizer states."""

    def local_bytes(value: object) -> int:
        local = value.to_local() if isinstance(value, DTensor) else value
        return local.nbytes if isinstance(local, Tensor) else 0

    weights = sum(local_bytes(parameter) for parameter in model.parameters())
    states = sum(local_bytes(value) for state in optimizer.state.values() for value in state.values())
    return (2 * weights + states) / GIB


def fit_group(
    group: PackingGroup, measure: Callable[[PackingGroup, Sequence[int]], Measurement], *, num_layers: int, budget_gib: float
) -> PackingGroup | None:
    """Find the fewest recomputed layers with which a group fits (HBP paper, Algorithms 3 and 4: GreedyProfileCkpt).

    Memory is measured with all layers recomputed and with two fewer. A straight line through the two lowest runs says how many
    layers are to spare or missing; running so many draws the next line, until no further layer is to spare.

    Args:
        group: all but its ``ac_layers`` counts.
        measure: runs a group with documents.
        num_layers: of the model.
        budget_gib: memory of a rank.

    Returns:
        The group with its layers, with which it was run; None where it does not fit with all of them.
    """
    whole = (group.pack_len,)  # one document: the most that any pack needs
    peaks: dict[int, float] = {}  # by recomputed layers
    wanted: int | None = num_layers
    while wanted is not None:
        peak_gib = measure(replace(group, ac_layers=wanted), whole).peak_gib
        peaks[wanted] = math.inf if peak_gib is None else peak_gib
        if peaks[num_layers] > budget_gib:
            return None
        wanted = _next_layers(peaks, budget_gib) if len(peaks) > 1 else max(0, num_layers - _PROBED_LAYERS)
    return replace(group, ac_layers=_fewest(peaks, budget_gib))


def _fewest(peaks: Mapping[int, float], budget_gib: float) -> int:
    return min(layers for layers, peak_gib in peaks.items() if peak_gib <= budget_gib)


def _next_layers(peaks: Mapping[int, float], budget_gib: float) -> int | None:
    """Give the recomputed layers to run next; None where one layer fewer than the fewest that fit was or would be too many.

    Args:
        peaks: GiB by recomputed layers, two at least; infinite where memory ran out.
        budget_gib: what at least one of them is within.
    """
    fewest = _fewest(peaks, budget_gib)
    least = max((layers for layers in peaks if layers < fewest), default=-1) + 1  # all below were run, and did not fit
    low, *others = sorted(layers for layers, peak_gib in peaks.items() if math.isfinite(peak_gib))
    if fewest == least:
        return None
    if not others:  # no line: the other runs ran out of memory
        return fewest - 1
    layer_gib = (peaks[low] - peaks[others[0]]) / (others[0] - low)
    to_spare = int((budget_gib - peaks[fewest]) / layer_gib) if layer_gib > 0 else fewest
    return max(least, fewest - to_spare) if to_spare else None
