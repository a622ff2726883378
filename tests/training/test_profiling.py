from collections.abc import Sequence

import pytest

from hbp_tune.components.planning.fitting import MemoryLine
from hbp_tune.components.planning.measurements import Measurement
from hbp_tune.components.planning.records import PackingGroup
from hbp_tune.components.training.profiling import fit_group

GROUP = PackingGroup(name="1K", pack_len=1024)


class FakeMachine:
    """Memory by a line, with a step at some layers that no line foretells."""

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
    assert machine.runs == [32, 30, 22, 23, 24]


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
def test_one_layer_fewer_does_not_fit(budget_gib: float) -> None:
    machine = FakeMachine()
    fewest = machine.fit(budget_gib)
    assert fewest is not None
    peaks = [machine.line.peak_gib(PackingGroup(name="g", pack_len=1024, ac_layers=n)) for n in range(33)]
    assert peaks[fewest] <= budget_gib
    assert fewest == 0 or peaks[fewest - 1] > budget_gib
