"""The cost model against the HBP paper's figures, one half fitted and the other predicted."""

import numpy as np
import pytest
from paper_groups import BUDGET_GIB, FULL, OUT_OF_MEMORY, errors, fit_line, fit_rows, measurements, without_gathering

from hbp_tune.planning.costs.cost import LLAMA3_1_8B
from hbp_tune.planning.costs.fitting import fit_rates
from hbp_tune.planning.costs.hardware import H100
from hbp_tune.planning.plans.records import PackingGroup


def test_default_rates_explain_all_timings() -> None:
    assert np.abs(errors(H100, 4096)).max() < 0.035


@pytest.mark.parametrize("fitted", [0, 1])
def test_half_of_the_timings_foretells_the_others(fitted: int) -> None:
    doc_len, fit = fit_rows(slice(fitted, None, 2))
    assert np.abs(errors(fit.rates, doc_len)[1 - fitted :: 2]).max() < 0.05


@pytest.mark.parametrize("doc_len", [1024, 8192])
def test_the_rows_at_equal_tokens_are_the_same_documents(doc_len: int) -> None:
    alone = measurements(doc_len)[len(FULL) :]
    assert fit_rates(LLAMA3_1_8B, alone, without_gathering(H100)).rms_error < 0.003


@pytest.mark.parametrize("fitted", [0, 1])
def test_half_of_the_recomputed_layers_foretells_the_others(fitted: int) -> None:
    line = fit_line(FULL[fitted::2])
    for length, cp_degree, ac_layers, _ in FULL[1 - fitted :: 2]:
        group = PackingGroup(name="g", pack_len=1024 * length, cp_degree=cp_degree)
        assert line.fewest_ac_layers(group, BUDGET_GIB) == pytest.approx(ac_layers, abs=2)
    for length, cp_degree in OUT_OF_MEMORY:
        assert line.fewest_ac_layers(PackingGroup(name="g", pack_len=1024 * length, cp_degree=cp_degree), BUDGET_GIB) is None
