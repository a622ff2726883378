"""The cost model against the HBP paper's figures, one half fitted and the other foretold."""

import pytest
from paper_groups import BUDGET_GIB, FULL, MIXED, OUT_OF_MEMORY, fit_line, measurement, predict

from hbp_tune.components.planning.cost import LLAMA3_1_8B, CostModel
from hbp_tune.components.planning.fitting import fit_rates
from hbp_tune.components.planning.hardware import H100
from hbp_tune.components.planning.records import PackingGroup


@pytest.mark.parametrize("fitted", [0, 1])
def test_half_of_the_timings_foretells_the_others(fitted: int) -> None:
    cases = FULL + MIXED
    measured = [measurement(case, 1024 * case[0] if index < len(FULL) else 2048) for index, case in enumerate(cases)]
    model = CostModel(LLAMA3_1_8B, fit_rates(LLAMA3_1_8B, measured[fitted::2], H100).rates)
    for one in measured[1 - fitted :: 2]:
        assert predict(model, one) == pytest.approx(one.micro_step_s, rel=0.15)


@pytest.mark.parametrize("fitted", [0, 1])
def test_half_of_the_recomputed_layers_foretells_the_others(fitted: int) -> None:
    line = fit_line(FULL[fitted::2])
    for length, cp_degree, ac_layers, _ in FULL[1 - fitted :: 2]:
        group = PackingGroup(name="g", pack_len=1024 * length, cp_degree=cp_degree)
        assert line.fewest_ac_layers(group, BUDGET_GIB) == pytest.approx(ac_layers, abs=1)
    for length, cp_degree in OUT_OF_MEMORY:
        assert line.fewest_ac_layers(PackingGroup(name="g", pack_len=1024 * length, cp_degree=cp_degree), BUDGET_GIB) is None
