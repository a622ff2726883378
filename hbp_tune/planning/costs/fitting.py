"""What a machine reaches, fitted to measurements: rates to seconds, and a line of memory to GiB."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hbp_tune.errors import ConfigError
from hbp_tune.planning.costs.cost import CostModel, ModelShape
from hbp_tune.planning.costs.hardware import Rates
from hbp_tune.planning.costs.measurements import Measurement
from hbp_tune.planning.plans.records import PackingGroup

# In this order they are solved for; what the measurements say nothing about keeps what it was.
_FITTED = ("token_flops_per_s", "square_flops_per_s", "exchange_bytes_per_s", "network_bytes_per_s")
# Few measurements can make a part vanish, as if its rate were infinite. Rates of known GPUs start at a third to a seventh of what
# data sheets give, so that none is taken to be more than eight times its start.
_MOST_OVER_START = 8
# Errors of more than so many times the median error, and of more than timing scatters by anyhow, count by their size, not by its
# square: a run that something disturbed.
_USUAL_ERRORS, _USUAL_SCATTER = 2.0, 0.02
_REWEIGHTINGS = 50
_SWEEPS = 20_000
_TOLERANCE = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FittedRates:
    """Rates that explain measurements, and how well.

    Args:
        rates: fitted; what no measurement depends on is taken from where the fit started.
        errors: ``float64[measurements]``, predicted over measured seconds, less 1.
        fitted: names of the rates that were solved for.
    """

    rates: Rates
    errors: NDArray[np.float64]
    fitted: tuple[str, ...]

    @property
    def rms_error(self) -> float:
        """Root of the mean square of the errors."""
        return float(np.sqrt(np.mean(self.errors**2)))


def predict_s(cost: CostModel, measurement: Measurement) -> float:
    """Model the seconds of what was measured: forward and backward of one pack, or gathering of weights where that is slower."""
    busy_s = float(_unit_seconds(cost, [measurement]).sum()) + cost.micro_step_s
    return max(busy_s, cost.gather_s(measurement.world_size))


def fit_rates(shape: ModelShape, measurements: Sequence[Measurement], start: Rates) -> FittedRates:
    """Fit rates to relative errors, so that short and long packs count alike.

    By least squares, with less weight for measurements far off the rest (Huber 1964, iteratively reweighted): one run that
    something disturbed must not move all rates.

    Seconds are linear in the inverses of the rates, which are bounded: none is negative, none more than eight times as fast as
    its start. Fixed seconds of a micro-step are solved for where there are more measurements than rates that they depend on,
    and are 0 where there are not.

    Args:
        shape: of the model that was measured.
        measurements: those that did not fit are left out.
        start: rates of a machine of that kind, also of how many ranks a node has.

    Raises:
        ConfigError: fewer than two measurements have a time.
    """
    timed = [measurement for measurement in measurements if measurement.micro_step_s is not None]
    if len(timed) < 2:
        raise ConfigError(f"{len(timed)} of {len(measurements)} measurements have a time; at least 2 are needed to fit rates")
    seconds = np.array([measurement.micro_step_s for measurement in timed], dtype=np.float64)
    # Seconds by the start's rates, as parts that scale with the inverse of one rate each.
    parts = _unit_seconds(CostModel(shape, start), timed)
    least = np.where(parts.any(axis=0), 1 / _MOST_OVER_START, 0.0)
    if has_fixed := len(timed) > np.count_nonzero(least):
        parts, least = np.column_stack((parts, np.ones(len(timed)))), np.append(least, 0.0)
    scales = _robust_least_squares(parts / seconds[:, None], least)
    solved = {name: getattr(start, name) / float(scale) for name, scale in zip(_FITTED, scales, strict=False) if scale > 0}
    rates = replace(start, **solved, micro_step_tokens=0.0)
    if has_fixed:
        rates = replace(rates, micro_step_tokens=float(scales[-1]) / CostModel(shape, rates).token_s)
    fitted = CostModel(shape, rates)
    predicted = np.array([predict_s(fitted, measurement) for measurement in timed])
    return FittedRates(
        rates=rates, errors=predicted / seconds - 1, fitted=(*solved, *(("micro_step_tokens",) if has_fixed else ()))
    )


def _unit_seconds(cost: CostModel, measurements: Sequence[Measurement]) -> NDArray[np.float64]:
    """Give ``float64[measurements, 4]``: seconds by the rate that they are inverse to, in the order of `_FITTED`."""
    groups = [measurement.group for measurement in measurements]
    tokens = np.array([measurement.tokens for measurement in measurements])
    squares = np.array([measurement.squares for measurement in measurements])
    packs = (
        np.array([group.cp_degree for group in groups]),
        np.array([group.ac_layers for group in groups]),
        np.array([group.ac_mode == "selective" for group in groups]),
    )
    linear = cost.pack_seconds(tokens, np.zeros_like(squares), *packs)
    attention = cost.pack_seconds(np.zeros_like(tokens), squares, *packs)
    inside = CostModel(cost.shape, replace(cost.rates, network_bytes_per_s=float("inf")))
    exchange = inside.pack_seconds(tokens, np.zeros_like(squares), *packs).exchange
    computed = (linear.linear + linear.recompute, attention.attention + attention.recompute)
    return np.column_stack((*computed, exchange, linear.exchange - exchange))


def _robust_least_squares(matrix: NDArray[np.float64], least: NDArray[np.float64]) -> NDArray[np.float64]:
    """Minimise Huber's loss of ``matrix @ x - 1`` over ``x >= least``."""
    target = 1.0 - matrix @ least
    weights = np.ones(len(matrix))
    for _ in range(_REWEIGHTINGS):
        scales = least + non_negative_least_squares(matrix * weights[:, None], target * weights)
        errors = np.abs(matrix @ scales - 1.0)
        usual = max(_USUAL_ERRORS * float(np.median(errors)), _USUAL_SCATTER)
        before, weights = weights, np.sqrt(np.minimum(1.0, usual / np.maximum(errors, _TOLERANCE)))
        if np.abs(weights - before).max() < 1e-6:
            break
    return scales


def non_negative_least_squares(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve ``min |matrix @ x - target|`` over ``x >= 0`` by coordinate descent: the problem is convex, so it finds the minimum.

    Args:
        matrix: ``float64[rows, columns]``; a column of zeros gets 0.
        target: ``float64[rows]``.

    Returns:
        ``float64[columns]``.
    """
    norms = np.linalg.norm(matrix, axis=0)
    scaled = matrix / np.where(norms > 0, norms, 1.0)
    gram, correlation = scaled.T @ scaled, scaled.T @ target
    solution = np.zeros(matrix.shape[1])
    for _ in range(_SWEEPS):
        before = solution.copy()
        for column in np.flatnonzero(norms > 0):
            slack = correlation[column] - gram[column] @ solution
            solution[column] = max(0.0, solution[column] + slack)
        if np.abs(solution - before).max() <= _TOLERANCE * max(1.0, np.abs(solution).max()):
            break
    return solution / np.where(norms > 0, norms, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLine:
    """Memory of a rank by its tokens and recomputed layers: ``fixed + tokens * (kept layers * a + recomputed layers * b)``.

    With one length it is the straight line of the HBP paper's Algorithm 4 (GreedyProfileCkpt), over lengths a plane. What
    tokens need outside the layers is in both a and b, a share for each layer: every layer is one or the other.

    Args:
        num_layers: of the model.
        fixed_gib: what does not depend on the tokens.
        kept_gib: of each token and layer that keeps its activations.
        recomputed_gib: of each token and layer that recomputes them.
    """

    num_layers: int
    fixed_gib: float
    kept_gib: float
    recomputed_gib: float

    def peak_gib(self, group: PackingGroup) -> float:
        """Predict the fullest moment of a step with full packs."""
        local_len = group.pack_len / group.cp_degree
        layers = (self.num_layers - group.ac_layers) * self.kept_gib + group.ac_layers * self.recomputed_gib
        return self.fixed_gib + local_len * layers

    def fewest_ac_layers(self, group: PackingGroup, budget_gib: float) -> int | None:
        """Give the fewest ``ac_layers`` with which the group fits; None where it does not with all of them.

        Args:
            group: all but its ``ac_layers`` counts.
            budget_gib: memory of the device.
        """
        for ac_layers in range(self.num_layers + 1):
            if self.peak_gib(replace(group, ac_layers=ac_layers)) <= budget_gib:
                return ac_layers
        return None


def fit_memory(measurements: Sequence[Measurement], num_layers: int) -> MemoryLine:
    """Fit a memory line to peaks, by non-negative least squares of relative errors.

    Args:
        measurements: of full packs with one ``ac_mode``; those that did not fit are left out.
        num_layers: of the model.

    Raises:
        ConfigError: there are fewer than two numbers of recomputed layers to tell them apart by.
    """
    fitting = [measurement for measurement in measurements if measurement.peak_gib is not None]
    if len({measurement.group.ac_layers for measurement in fitting}) < 2:
        raise ConfigError("a memory line needs peaks at two values of ac_layers at least; measure another")
    peaks = np.array([measurement.peak_gib for measurement in fitting], dtype=np.float64)
    local = np.array([measurement.group.pack_len / measurement.group.cp_degree for measurement in fitting])
    recomputed = np.array([measurement.group.ac_layers for measurement in fitting])
    columns = np.column_stack((np.ones(len(fitting)), local * (num_layers - recomputed), local * recomputed))
    if len(set(local)) == 1:
        columns[:, 0] = 0.0  # what is fixed cannot be told from what recomputed layers need
    solved = non_negative_least_squares(columns / peaks[:, None], np.ones(len(fitting)))
    fixed, kept, recomputing = (float(value) for value in solved)
    return MemoryLine(num_layers=num_layers, fixed_gib=fixed, kept_gib=kept, recomputed_gib=recomputing)
