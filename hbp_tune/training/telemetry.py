"""What each optimizer step was like, over all ranks: planned figures beside measured ones, by one collective a step."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hbp_tune.data.batches.batch import PackBatch
from hbp_tune.planning.comparison.metrics import StepMetrics
from hbp_tune.planning.costs.cost import ModelShape
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.training.busy import BusyClock
from hbp_tune.training.hardware import host_memory_gib
from hbp_tune.training.time_left import TimeLeft

_FIRST_BUSY = 5  # where micro-steps begin in what ranks gather


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What all ranks together know of a step once its last backward is done; equal on every rank.

    Args:
        loss: of the step, summed over ranks and micro-steps.
        stop: a rank asks to end the run after this step.
        idle_ratio: measured busy time that ranks lack to the busiest one, summed over micro-steps, over the busiest ones' sum.
        slowest_rank: the one with most busy time.
        data_wait_s: seconds that the rank which waited longest waited for its packs.
        peak_memory_gib: of forward and backward, on the device of the rank that allocated most; 0 on CPU.
        host_memory_gib: most host memory of a process so far.
        started_s: when this rank began the step, by its own clock.
    """

    loss: float
    stop: bool
    idle_ratio: float
    slowest_rank: int
    data_wait_s: float
    peak_memory_gib: float
    host_memory_gib: float
    started_s: float


class StepTelemetry:
    """Measures optimizer steps: batches come through `watch`, `gather` ends their backward, `finish` ends the step.

    A step lasts from asking for its first pack to `finish`. What comes after, saving or validation, counts for none.

    Args:
        steps: figures of all steps of the run, as planned.
        groups: as in the plan.
        shape: of the model.
        device: of the run.
        peak_flops_per_s: of the device; None where it is not known, and no ``mfu`` is logged.
        busy: the clock that leaves out waiting for other ranks.
    """

    def __init__(
        self,
        steps: StepMetrics,
        groups: Sequence[PackingGroup],
        *,
        shape: ModelShape,
        device: torch.device,
        peak_flops_per_s: float | None,
        busy: BusyClock,
    ) -> None:
        self._steps = steps
        self._groups = groups
        self._shape = shape
        self._device = device
        self._busy = busy
        self._is_cuda = device.type == "cuda"
        self._peak_flops_per_s = peak_flops_per_s
        self._time_left = TimeLeft(steps)
        self._latest: dict[str, float] = {}  # by group: loss and most memory
        self._started_s: float | None = None
        self._data_wait_s = 0.0

    def watch(self, batches: Iterable[PackBatch]) -> Iterator[PackBatch]:
        """Pass batches on: times the wait for each, and what is done with it until the next is asked for or `gather`."""
        iterator = iter(batches)
        while True:
            if self._started_s is not None:  # in the middle of a step
                self._busy.stop()
            asked_s = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            got_s = time.perf_counter()
            if self._started_s is None:
                self._started_s = asked_s
                if self._is_cuda:
                    torch.cuda.reset_peak_memory_stats(self._device)
            self._data_wait_s += got_s - asked_s
            self._busy.start()
            yield batch

    def gather(self, loss_sum: Tensor, *, stop: bool = False) -> StepRecord:
        """End forward and backward of a step; collective: every rank must call it.

        Args:
            loss_sum: a scalar, this rank's share of the step's loss.
            stop: whether this rank wants the run to end after this step.
        """
        self._busy.stop()
        busy_s = self._busy.read_s()  # as many micro-steps on every rank
        peak_memory_gib = torch.cuda.max_memory_allocated(self._device) / 2**30 if self._is_cuda else 0.0
        values = [loss_sum.item(), float(stop), self._data_wait_s, peak_memory_gib, host_memory_gib(), *busy_s]
        mine = torch.tensor(values, dtype=torch.float64, device=self._device)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        ranks = torch.stack(gathered).cpu()
        busy = ranks[:, _FIRST_BUSY:]
        assert self._started_s is not None, "batches come through watch"
        started_s, self._started_s, self._data_wait_s = self._started_s, None, 0.0
        return StepRecord(
            loss=ranks[:, 0].sum().item(),
            stop=bool(ranks[:, 1].any()),
            idle_ratio=1.0 - (busy.mean(dim=0).sum() / busy.amax(dim=0).sum()).item(),
            slowest_rank=int(busy.sum(dim=1).argmax()),
            data_wait_s=ranks[:, 2].max().item(),
            peak_memory_gib=ranks[:, 3].max().item(),
            host_memory_gib=ranks[:, 4].max().item(),
            started_s=started_s,
        )

    def finish(self, record: StepRecord, step: int, *, lr: float, grad_norm: float) -> dict[str, float]:
        """End a step, and give its figures by the names under which they are logged; docs/metrics.md defines them.

        Args:
            record: of the step, from `gather`.
            step: counted over the run, from 0.
            lr: learning rate of the step.
            grad_norm: before clipping.
        """
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
        step_s = time.perf_counter() - record.started_s
        self._time_left.add(step, step_s)
        group = self._groups[self._steps.group[step]]
        num_tokens, world_size = int(self._steps.tokens[step]), dist.get_world_size()
        metrics = {
            "loss": record.loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second_per_gpu": num_tokens / (step_s * world_size),
            "num_tokens": num_tokens,
            "pack_len": group.pack_len,
            "cp_degree": group.cp_degree,
            "step_s": step_s,
            "data_wait_s": record.data_wait_s,
            "data_wait_ratio": record.data_wait_s / step_s,
            "idle_ratio": record.idle_ratio,
            "slowest_rank": record.slowest_rank,
            "host_memory_gib": record.host_memory_gib,
            **{name: float(getattr(self._steps, name)[step]) for name in ("abr", "dbr", "pr", "cr")},
        }
        self._latest[f"loss_{group.name}"] = record.loss
        if self._is_cuda:
            name = f"peak_memory_gib_{group.name}"
            self._latest[name] = max(self._latest.get(name, 0.0), record.peak_memory_gib)
        if self._peak_flops_per_s:
            flops = self._shape.token_flops * num_tokens + self._shape.square_flops * int(self._steps.squares[step])
            metrics["mfu"] = flops / (step_s * world_size * self._peak_flops_per_s)
        if (time_left_s := self._time_left.after_s(step)) is not None:
            metrics["time_left_s"] = time_left_s
        return metrics | self._latest
