from collections.abc import Sequence
from dataclasses import replace

import pytest

from hbp_tune.planning.costs.fitting import MemoryLine
from hbp_tune.planning.costs.measurements import Measurement
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.training.profiling import fit_group

GROUP = PackingGroup(name="1K", pack_len=1024)


class FakeMachine:
    """Memory by a line, with a step at some layers that no line predicts."""

    def __init__(self, extra_gib: float = 0.0, from_layers: int = 0) -> None:
        self.line = MemoryLine(num_layers=32, fixed_gib=10.0, kept_gib=2**-10, recomputed_gib=2**-14)
        self.extra_gib, self.from_layers = extra_gib, from_layers
        self.runs: list[int] = []

    def measure(self, group: PackingGroup, doc_lens: Sequence[int]) -> Measurement:
        assert tuple(doc_lens) == (1024,), "the most that a pack needs: one document"
        self.runs.append(group.ac_layers)
        peak = self.line.peak_gib(group) + (self.extra_gib if group.ac_layers <= self.from_layers else 0.0)
        return Measurement(group=group, world_size=2, doc_lens=tuple(doc_lens), micro_step_s=1.0, peak_gib=peak)

    def fit(self, budget_gib: float) -> int | None:
        fitted = fit_group(GROUP, self.measure, num_layers=32, budget_gib=budget_gib)
        return None if fitted is None else fitted.ac_layers


def test_the_line_gives_the_fewest_layers_and_they_are_run() -> None:
    # 10 GiB, a GiB for a layer that is kept, a sixteenth for one that recomputes: 12 + 30 * 15 / 16 would keep all.
    machine = FakeMachine()
    assert machine.fit(22.0) == 22
    assert machine.runs == [32, 30, 22]
    assert FakeMachine().fit(100.0) == 0
    assert FakeMachine().fit(11.0) is None
    assert FakeMachine().fit(12.0) == 32, "not two layers fewer"


def test_a_line_that_promised_too_much_is_corrected_by_running() -> None:
    machine = FakeMachine(extra_gib=2.0, from_layers=29)
    assert machine.fit(22.0) == 24
    assert machine.runs == [32, 30, 22, 24]


def test_a_line_that_promised_too_little_is_corrected_by_running() -> None:
    machine = FakeMachine(extra_gib=-2.0, from_layers=29)
    assert machine.fit(22.0) == 20
    assert machine.runs == [32, 30, 22, 19, 20], "19 do not fit"


def test_without_a_line_a_layer_fewer_is_run_until_memory_runs_out() -> None:
    runs = []

    def measure(group: PackingGroup, doc_lens: Sequence[int]) -> Measurement:
        runs.append(group.ac_layers)
        found = 1.0 if group.ac_layers > 6 else None
        return Measurement(group=group, world_size=1, doc_lens=(1024,), micro_step_s=found, peak_gib=found)

    assert fit_group(GROUP, measure, num_layers=8, budget_gib=2.0) == PackingGroup(name="1K", pack_len=1024, ac_layers=7)
    assert runs == [8, 6, 7]


def test_two_layers_are_probed_with_all_and_none() -> None:
    runs = []

    def measure(group: PackingGroup, doc_lens: Sequence[int]) -> Measurement:
        runs.append(group.ac_layers)
        return Measurement(group=group, world_size=1, doc_lens=(1024,), micro_step_s=1.0, peak_gib=3.0 - group.ac_layers)

    assert fit_group(GROUP, measure, num_layers=2, budget_gib=2.0) == PackingGroup(name="1K", pack_len=1024, ac_layers=1)
    assert runs[:2] == [2, 0]


def test_what_runs_out_of_memory_does_not_fit() -> None:
    def measure(group: PackingGroup, doc_lens: Sequence[int]) -> Measurement:
        return Measurement(group=group, world_size=1, doc_lens=(1024,), micro_step_s=None, peak_gib=None)

    assert fit_group(GROUP, measure, num_layers=2, budget_gib=2.0) is None


@pytest.mark.parametrize("budget_gib", [12.5, 17.3, 30.1, 41.9])
@pytest.mark.parametrize("extra_gib", [-3.0, -0.3, 0.0, 0.3, 3.0])
@pytest.mark.parametrize("from_layers", [5, 17, 31])
def test_one_layer_fewer_does_not_fit(budget_gib: float, extra_gib: float, from_layers: int) -> None:
    machine = FakeMachine(extra_gib, from_layers)
    fewest = machine.fit(budget_gib)
    assert fewest is not None
    peaks = [machine.measure(replace(GROUP, ac_layers=n), (1024,)).peak_gib or 0.0 for n in range(33)]
    assert peaks[fewest] <= budget_gib
    assert fewest == 0 or peaks[fewest - 1] > budget_gib
