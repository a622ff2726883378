"""How long the run will still take: what the plan's cost model says, corrected by what steps took."""

import numpy as np

from hbp_tune.planning.comparison.metrics import StepMetrics


class TimeLeft:
    """Predicts the seconds of the steps to come.

    Modelled seconds are scaled by measured over modelled seconds of the same group so far, or of all groups where a group has
    not been measured. The first measured step is left out: it warms up and compiles.

    Args:
        steps: all steps of the run.
    """

    def __init__(self, steps: StepMetrics) -> None:
        self._steps = steps
        self._num_groups = int(steps.group.max(initial=0)) + 1
        self._measured_s = np.zeros(self._num_groups)
        self._modelled_s = np.zeros(self._num_groups)
        self._is_warm = False

    def add(self, step: int, step_s: float) -> None:
        """Take in what a step took.

        Args:
            step: counted over the run, from 0.
            step_s: measured.
        """
        if self._is_warm:
            self._measured_s[self._steps.group[step]] += step_s
            self._modelled_s[self._steps.group[step]] += self._steps.modelled_s[step]
        self._is_warm = True

    def after_s(self, step: int) -> float | None:
        """Give the seconds of all steps after ``step``, or None where nothing has been measured."""
        if not self._modelled_s.any():
            return None
        overall = self._measured_s.sum() / self._modelled_s.sum()
        scale = np.full(self._num_groups, overall)
        np.divide(self._measured_s, self._modelled_s, out=scale, where=self._modelled_s > 0)
        return float((self._steps.modelled_s[step + 1 :] * scale[self._steps.group[step + 1 :]]).sum())
