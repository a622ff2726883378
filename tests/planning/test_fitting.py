from dataclasses import replace

import numpy as np
import pytest

from hbp_tune.errors import ConfigError
from hbp_tune.planning.costs.cost import LLAMA3_1_8B, CostModel
from hbp_tune.planning.costs.fitting import (
    MemoryLine,
    fit_memory,
    fit_rates,
    non_negative_least_squares,
    predict_s,
)
from hbp_tune.planning.costs.hardware import H100, Rates
from hbp_tune.planning.costs.measurements import Measurement
from hbp_tune.planning.plans.records import PackingGroup

TRUE = Rates(
    machine="made up",
    token_flops_per_s=3e14,
    square_flops_per_s=2e14,
    exchange_bytes_per_s=5e10,
    network_bytes_per_s=1e10,
    gather_bytes_per_s=3e11,
    gather_network_bytes_per_s=1e11,
    micro_step_tokens=300,
)


def measured(length: int, cp_degree: int, ac_layers: int, *, documents: int = 1, rates: Rates = TRUE) -> Measurement:
    """Make up a measurement of a machine with these rates."""
    group = PackingGroup(name="g", pack_len=length, cp_degree=cp_degree, ac_layers=ac_layers)
    blank = Measurement(group=group, world_size=32, doc_lens=(length // documents,) * documents, micro_step_s=1.0, peak_gib=1.0)
    return replace(blank, micro_step_s=predict_s(CostModel(LLAMA3_1_8B, rates), blank))


EVERYTHING = [
    measured(16_384, 1, 28),
    measured(16_384, 1, 0, documents=16),
    measured(32_768, 2, 28),
    measured(32_768, 4, 23, documents=8),
    measured(65_536, 8, 8),
    measured(131_072, 8, 29),
    measured(131_072, 16, 23),
    measured(131_072, 16, 0, documents=4),
]


def test_known_rates_are_found_again() -> None:
    found = fit_rates(LLAMA3_1_8B, EVERYTHING, H100)
    for name in ("token_flops_per_s", "square_flops_per_s", "exchange_bytes_per_s", "network_bytes_per_s", "micro_step_tokens"):
        assert getattr(found.rates, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name
        assert name in found.fitted
    assert np.abs(found.errors).max() < 1e-4
    # What gathers bound is not solved for.
    assert found.rates.gather_bytes_per_s == H100.gather_bytes_per_s


def test_what_no_measurement_tells_keeps_its_start() -> None:
    plain = replace(TRUE, micro_step_tokens=0.0)
    found = fit_rates(LLAMA3_1_8B, [measured(n, 1, 0, rates=plain) for n in (16_384, 65_536)], H100)
    assert found.fitted == ("token_flops_per_s", "square_flops_per_s")
    assert found.rates.token_flops_per_s == pytest.approx(plain.token_flops_per_s, rel=1e-6)
    assert found.rates.exchange_bytes_per_s == H100.exchange_bytes_per_s
    assert found.rms_error < 1e-6


def test_a_prediction_has_the_fixed_seconds_of_a_micro_step() -> None:
    one = EVERYTHING[0]
    without = predict_s(CostModel(LLAMA3_1_8B, replace(TRUE, micro_step_tokens=0.0)), one)
    assert predict_s(CostModel(LLAMA3_1_8B, TRUE), one) == pytest.approx(without + 300 * 6 * LLAMA3_1_8B.linear_params / 3e14)


def test_a_part_that_would_vanish_stays_finite() -> None:
    # A micro-step over eight ranks as fast as one over none: exchange seems to take no time.
    alone, shared = measured(16_384, 1, 0), measured(131_072, 8, 0, documents=8)
    shared = replace(shared, micro_step_s=alone.micro_step_s)
    found = fit_rates(LLAMA3_1_8B, [alone, measured(4096, 1, 0), shared, shared], H100)
    assert found.rates.exchange_bytes_per_s == pytest.approx(8 * H100.exchange_bytes_per_s)
    assert found.rms_error < 0.05, "the others make up for it"


@pytest.mark.parametrize("seed", range(20))
def test_a_fit_explains_at_least_what_its_start_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noisy = [replace(one, micro_step_s=(one.micro_step_s or 0) * rng.uniform(0.7, 1.3)) for one in EVERYTHING]
    found = fit_rates(LLAMA3_1_8B, noisy, TRUE)
    before = [predict_s(CostModel(LLAMA3_1_8B, TRUE), one) / (one.micro_step_s or 1) - 1 for one in noisy]
    assert found.rms_error <= np.sqrt(np.mean(np.square(before))) + 1e-9


@pytest.mark.parametrize("disturbed", range(len(EVERYTHING)))
def test_one_run_that_was_disturbed_hardly_moves_the_others(disturbed: int) -> None:
    rng = np.random.default_rng(disturbed)
    # Every run three times, each a little off, as a machine gives them; one took half as long again.
    runs = [replace(one, micro_step_s=(one.micro_step_s or 0) * rng.normal(1.0, 0.02)) for one in EVERYTHING * 3]
    slow = replace(runs[disturbed], micro_step_s=1.5 * (runs[disturbed].micro_step_s or 0))
    found = fit_rates(LLAMA3_1_8B, [*runs[:disturbed], slow, *runs[disturbed + 1 :]], H100)
    off = [predict_s(CostModel(LLAMA3_1_8B, found.rates), one) / (one.micro_step_s or 1) - 1 for one in EVERYTHING]
    assert np.abs(off).max() < 0.04
    assert found.errors[disturbed] < -0.25, "it shows in the errors"


def test_errors_are_relative_and_signed() -> None:
    once, twice = measured(16_384, 1, 0), measured(16_384, 1, 0)
    assert once.micro_step_s is not None
    twice = replace(twice, micro_step_s=2 * once.micro_step_s)
    errors = fit_rates(LLAMA3_1_8B, [once, twice], H100).errors
    assert errors[0] > 0 > errors[1]
    assert (1 + errors[0]) == pytest.approx(2 * (1 + errors[1]))


def test_one_time_is_not_enough() -> None:
    group = PackingGroup(name="g", pack_len=64)
    out = Measurement(group=group, world_size=1, doc_lens=(64,), micro_step_s=None, peak_gib=None)
    with pytest.raises(ConfigError, match=r"1 of 2 measurements have a time; at least 2 are needed to fit rates"):
        fit_rates(LLAMA3_1_8B, [EVERYTHING[0], out], H100)


@pytest.mark.parametrize("seed", range(20))
def test_least_squares_meets_its_optimality_conditions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, target = rng.random((9, 4)), rng.normal(size=9)
    solution = non_negative_least_squares(matrix, target)
    gradient = matrix.T @ (matrix @ solution - target)
    assert (solution >= 0).all()
    assert (gradient >= -1e-6).all(), "no entry would be better if larger"
    assert np.abs(gradient * solution).max() < 1e-6, "nor smaller, where it can be"


def test_a_column_of_zeros_gets_nothing() -> None:
    assert non_negative_least_squares(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([2.0, 4.0])).tolist() == [3.0, 0.0]


LINE = MemoryLine(num_layers=32, fixed_gib=20.0, kept_gib=2e-4, recomputed_gib=1e-5)


def peak(length: int, cp_degree: int, ac_layers: int) -> Measurement:
    group = PackingGroup(name="g", pack_len=length, cp_degree=cp_degree, ac_layers=ac_layers)
    return Measurement(group=group, world_size=8, doc_lens=(length,), micro_step_s=1.0, peak_gib=LINE.peak_gib(group))


def test_a_known_memory_line_is_found_again() -> None:
    found = fit_memory([peak(8192, 1, 0), peak(8192, 1, 32), peak(16_384, 1, 16), peak(32_768, 2, 32)], 32)
    for name in ("fixed_gib", "kept_gib", "recomputed_gib"):
        assert getattr(found, name) == pytest.approx(getattr(LINE, name), rel=1e-3)


def test_at_one_length_two_settings_make_the_straight_line() -> None:
    found = fit_memory([peak(8192, 1, 0), peak(8192, 1, 32)], 32)
    group = PackingGroup(name="g", pack_len=8192)
    for ac_layers in range(33):
        assert found.peak_gib(replace(group, ac_layers=ac_layers)) == pytest.approx(
            LINE.peak_gib(replace(group, ac_layers=ac_layers))
        )


def test_the_fewest_layers_that_fit() -> None:
    group = PackingGroup(name="g", pack_len=16_384)
    fewest = LINE.fewest_ac_layers(group, 60.0)
    assert fewest is not None
    assert LINE.peak_gib(replace(group, ac_layers=fewest)) <= 60.0 < LINE.peak_gib(replace(group, ac_layers=fewest - 1))
    assert LINE.fewest_ac_layers(group, 25.0) is None
    assert LINE.fewest_ac_layers(group, 500.0) == 0


def test_a_memory_line_needs_two_settings() -> None:
    with pytest.raises(ConfigError, match="needs peaks at two values of ac_layers at least"):
        fit_memory([peak(8192, 1, 4), peak(16_384, 1, 4)], 32)
