import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hbp_tune.parallel import compile_layers, make_checkpointable
from hbp_tune.parallel.activation_checkpoint import set_ac_layers
from hbp_tune.planning import ModelShape, PackingGroup, StepMetrics
from hbp_tune.training import StepTelemetry, busy_clock, peak_flops_per_s
from hbp_tune.training.busy import CpuTimeClock
from hbp_tune.training.time_left import TimeLeft
from tests.ranks import RankPool

GROUPS = (PackingGroup(name="short", pack_len=64), PackingGroup(name="long", pack_len=256, cp_degree=2))
CPU = torch.device("cpu")


def planned(group: list[int], modelled_s: list[float], **arrays: list[float]) -> StepMetrics:
    """Steps of which only the given figures matter."""
    ones = np.ones(len(group))
    figures = {"tokens": ones, "squares": ones, "dbr": ones, "pr": ones, "abr": ones, "cr": ones}
    figures |= {name: np.array(values) for name, values in arrays.items()}
    return StepMetrics(group=np.array(group), modelled_s=np.array(modelled_s), **figures)


class FixedBusy:
    """A clock that gives what it is told."""

    def __init__(self, busy_s: list[float]) -> None:
        self._busy_s = busy_s
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def read_s(self) -> list[float]:
        return self._busy_s


def telemetry_of(steps: StepMetrics, busy: Any, peak: float | None = None) -> StepTelemetry:
    shape = ModelShape(num_layers=2, linear_params=100, attention_dim=8)
    return StepTelemetry(steps, GROUPS, shape=shape, device=CPU, peak_flops_per_s=peak, busy=busy)


def gather_job(stopper: int | None) -> tuple[Any, list[str]]:
    busy = FixedBusy([[1.0, 3.0], [4.0, 2.0]][dist.get_rank()])
    telemetry = telemetry_of(planned([0], [1.0]), busy)
    for _ in telemetry.watch(iter(range(2))):
        pass
    record = telemetry.gather(torch.tensor([0.25, 0.5][dist.get_rank()]), stop=dist.get_rank() == stopper)
    return record, busy.calls


def test_ranks_gather_one_record(ranks: Callable[[int], RankPool]) -> None:
    (record, calls), (other, _) = ranks(2).run(gather_job, 1)
    assert (record.loss, record.stop, record.slowest_rank) == (0.75, True, 1)
    # The busiest ranks take 4 and 3 seconds, the mean ones 2.5 and 2.5.
    assert record.idle_ratio == pytest.approx(1 - 5 / 7)
    assert (other.loss, other.stop, other.slowest_rank, other.idle_ratio) == (0.75, True, 1, record.idle_ratio)
    assert record.host_memory_gib == other.host_memory_gib > 0.01
    assert calls == ["start", "stop", "start", "stop", "stop"]
    assert not ranks(2).run(gather_job, None)[0][0].stop


def slow_packs() -> Iterator[int]:
    for index in range(4):
        time.sleep(0.05 if dist.get_rank() == 1 else 0.0)
        yield index


def timed_job() -> list[dict[str, float]]:
    """Two steps of two packs; packs are late on rank 1, and rank 0 rests between the steps."""
    telemetry = telemetry_of(planned([1, 0], [1.0, 1.0], tokens=[40, 60], squares=[500, 700]), FixedBusy([1.0]), peak=1e5)
    logged = []
    for index in telemetry.watch(slow_packs()):  # type: ignore[arg-type]
        if index % 2:
            record = telemetry.gather(torch.tensor(1.0 + index))
            logged.append(telemetry.finish(record, index // 2, lr=0.5, grad_norm=2.0))
            time.sleep(0.3)
    return logged


def test_a_step_lasts_from_its_first_pack_to_its_end(ranks: Callable[[int], RankPool]) -> None:
    logged, _ = ranks(2).run(timed_job)
    for step in logged:
        assert 0.1 <= step["data_wait_s"] < 0.3, "of the rank that waits longest"
        assert 0.1 <= step["step_s"] < 0.3, "without what comes after it"
        assert step["data_wait_ratio"] == pytest.approx(step["data_wait_s"] / step["step_s"])
        assert step["tokens_per_second_per_gpu"] == pytest.approx(step["num_tokens"] / step["step_s"] / 2)
    assert [(step["num_tokens"], step["pack_len"], step["cp_degree"]) for step in logged] == [(40, 256, 2), (60, 64, 1)]
    # Six operations a weight and token, and six a layer, width and squared length; two ranks of 1e5 a second.
    flops = 6 * 100 * 40 + 6 * 2 * 8 * 500
    assert logged[0]["mfu"] == pytest.approx(flops / (logged[0]["step_s"] * 2 * 1e5))


def test_each_group_keeps_its_latest_loss(ranks: Callable[[int], RankPool]) -> None:
    logged, _ = ranks(2).run(timed_job)
    assert {name: loss for name, loss in logged[0].items() if name.startswith("loss")} == {"loss": 4.0, "loss_long": 4.0}
    assert {name: loss for name, loss in logged[1].items() if name.startswith("loss")} == {
        "loss": 8.0,
        "loss_long": 4.0,
        "loss_short": 8.0,
    }


def burn(cpu_s: float) -> None:
    start_s = time.process_time()
    while time.process_time() - start_s < cpu_s:
        pass


def uneven_job() -> tuple[float, float]:
    """Rank 0 computes, rank 1 waits for it in a collective; give busy and wall seconds."""
    dist.barrier()
    clock, start_s = CpuTimeClock(), time.perf_counter()
    clock.start()
    burn(0.5 if dist.get_rank() == 0 else 0.0)
    dist.all_reduce(torch.zeros(10_000))
    clock.stop()
    (busy_s,) = clock.read_s()
    assert clock.read_s() == []
    return busy_s, time.perf_counter() - start_s


def test_a_rank_that_waits_in_gloo_is_not_busy(ranks: Callable[[int], RankPool]) -> None:
    (computing_s, _), (waiting_s, wall_s) = ranks(2).run(uneven_job)
    assert computing_s >= 0.5
    assert wall_s >= 0.45
    assert waiting_s < 0.25  # of half a second: some hundredths, more on a busy machine


def test_the_clock_of_a_cpu() -> None:
    assert isinstance(busy_clock(CPU, []), CpuTimeClock)


class FakeEvent:
    """A CUDA event on a device where a millisecond passes from one event to the next."""

    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.recorded += 1
        self.at_ms = FakeEvent.recorded

    def elapsed_time(self, later: "FakeEvent") -> float:
        return later.at_ms - self.at_ms


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_the_clock_of_a_gpu_counts_forwards_of_layers_once(monkeypatch: pytest.MonkeyPatch, is_compiled: bool) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    layers = [torch.nn.Linear(4, 4) for _ in range(3)]
    if is_compiled:
        compile_layers(layers, backend="eager")
    make_checkpointable(layers)
    set_ac_layers(layers, 2)
    clock = busy_clock(torch.device("cuda"), layers)

    def forward() -> torch.Tensor:
        hidden = torch.ones(1, 5, 4)
        for layer in layers:
            hidden = layer(hidden)
        return hidden.sum()

    forward()  # validation, say
    for num_forwards in (1, 2):
        clock.start()
        for _ in range(num_forwards):
            forward().backward()
        clock.stop()
    assert clock.read_s() == pytest.approx([0.003, 0.006])
    assert clock.read_s() == []


def test_time_left_by_hand() -> None:
    # Short steps are modelled as 1 s and 2 s, long ones as 10 s.
    left = TimeLeft(planned([0, 0, 1, 0, 1, 0, 2], [1.0, 1.0, 10.0, 1.0, 10.0, 2.0, 4.0]))
    left.add(0, 500.0)
    assert left.after_s(0) is None, "the first step warms up"
    left.add(1, 3.0)
    assert left.after_s(1) == pytest.approx(3 * (10 + 1 + 10 + 2 + 4)), "what is known of the short steps stands for all"
    left.add(2, 20.0)
    # Short ones take 3 times, long ones 2 times, others 23 / 11 times what is modelled.
    assert left.after_s(2) == pytest.approx(3 * (1 + 2) + 2 * 10 + 4 * 23 / 11)
    assert left.after_s(6) == 0.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("Some other GPU", None),
    ],
)
def test_peaks_by_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops_per_s(torch.device("cuda:0"), torch.bfloat16) == peak
    assert peak_flops_per_s(torch.device("cuda:0"), torch.float32) is None
    assert peak_flops_per_s(CPU, torch.bfloat16) is None
