"""Tables and curves of finished runs, for people: means, spreads, and where two methods differ by more than their seeds do."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quality.corpus import BUCKETS, RETRIEVAL_LENS
from quality.plots import Panel, draw
from quality.runs import CURRICULA, METHODS, NORMALIZERS, Run, default_run

# What was kept of each seed's run, by the run with seed 0.
Finished = Mapping[Run, Sequence[dict[str, Any]]]
# From so many standard errors on, a difference of means counts as more than the noise of seeds.
NOISE = 2.0
# A step whose gradient norm is so many times the median of its run counts as a spike.
SPIKE = 3.0
# Losses are drawn as means over so many steps, two of each group, which alternate.
SMOOTHED_STEPS = 4
_NAMES = [f"loss, to {n}" for n in BUCKETS] + [f"retrieval, {n}" for n in RETRIEVAL_LENS]


def by_setting(runs: Sequence[tuple[Run, dict[str, Any]]]) -> Finished:
    """Put the seeds of each setting together."""
    finished: dict[Run, list[dict[str, Any]]] = {}
    for run, kept in sorted(runs, key=lambda pair: pair[0].seed):
        finished.setdefault(replace(run, seed=0), []).append(kept)
    return finished


def methods_table(finished: Finished) -> str:
    """Give held-out loss and retrieval by length, a row a method, as Markdown: mean ± standard deviation over seeds."""
    rows = []
    for method in METHODS:
        if runs := finished.get(default_run(method)):
            rows.append([method, str(len(runs)), *map(_spread, _measures(runs).T)])
    return _table(["method", "seeds", *_NAMES], rows)


def verdicts_table(finished: Finished, baseline: str = "isf") -> str:
    """Compare every method with one of them, as Markdown: differences of means, and their size in standard errors.

    Three seeds tell a method's own spread badly, so that all methods' is pooled. Differences of `NOISE` standard errors and more
    are set in bold where the method is better, and in italics where it is worse.
    """
    measures = {method: _measures(runs) for method in METHODS if len(runs := finished.get(default_run(method), [])) > 1}
    degrees = sum(len(of) - 1 for of in measures.values())
    pooled = sum(of.var(0) * len(of) for of in measures.values()) / degrees if degrees else np.zeros(len(_NAMES))
    rows = []
    for method in [name for name in measures if name != baseline and baseline in measures]:
        mine, reference = measures[method], measures[baseline]
        errors = np.sqrt(pooled * (1 / len(mine) + 1 / len(reference)))
        rows.append([method, *map(_verdict, _NAMES, mine.mean(0) - reference.mean(0), errors)])
    return _table([f"less {baseline}", *_NAMES], rows)


def normalizers_table(finished: Finished, method: str = "hbp_cost") -> str:
    """Give the measures of every normaliser under every curriculum, as Markdown: mean ± standard deviation over seeds."""
    head = ["normaliser", "curriculum", "seeds", "loss, mean of buckets", _NAMES[len(BUCKETS) - 1], "retrieval, mean", _NAMES[-1]]
    rows = []
    for setting, runs in _by_loss(finished, method):
        losses, retrieval = np.split(_measures(runs), [len(BUCKETS)], axis=1)
        cells = (losses.mean(1), losses[:, -1], retrieval.mean(1), retrieval[:, -1])
        rows.append([setting.normalizer, setting.curriculum, str(len(runs)), *map(_spread, cells)])
    return _table(head, rows)


def gradients_table(finished: Finished, method: str = "hbp_cost") -> str:
    """Give how gradient norms vary within a run, as Markdown: their own size has no meaning across normalisers."""
    head = ["normaliser", "curriculum", "seeds", "median norm", "std / mean", "max / median", f"steps over {SPIKE:g} medians"]
    rows = []
    for setting, runs in _by_loss(finished, method):
        norms = [np.array(run["steps"]["grad_norm"]) for run in runs]
        cells = [
            np.array([[np.median(x), x.std() / x.mean(), x.max() / np.median(x), np.mean(x > SPIKE * np.median(x))]])
            for x in norms
        ]
        rows.append([setting.normalizer, setting.curriculum, str(len(runs)), *map(_spread, np.concatenate(cells).T)])
    return _table(head, rows)


def normalizer_curves(finished: Finished, curriculum: str, method: str = "hbp_cost") -> str:
    """Draw training loss and gradient norm of every normaliser under one curriculum, as SVG."""
    return _curves({s.normalizer: runs for s, runs in _by_loss(finished, method) if s.curriculum == curriculum})


def curriculum_curves(finished: Finished, normalizer: str = "ave_token", method: str = "hbp_cost") -> str:
    """Draw training loss and gradient norm of every curriculum under one normaliser, as SVG."""
    return _curves({s.curriculum: runs for s, runs in _by_loss(finished, method) if s.normalizer == normalizer})


def _curves(settings: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    losses = {name: _steps(runs, "loss") for name, runs in settings.items()}
    norms = {name: _steps(runs, "grad_norm") for name, runs in settings.items()}
    return draw(
        [
            Panel(
                title="Training loss",
                y_label=f"mean over targets, running mean of {SMOOTHED_STEPS} steps",
                curves={name: _smooth(values) for name, values in losses.items()},
            ),
            Panel(
                title="Gradient norm",
                y_label="over the run's median, logarithmic",
                is_log=True,
                curves={name: values / np.median(values, axis=1, keepdims=True) for name, values in norms.items()},
            ),
        ]
    )


def _by_loss(finished: Finished, method: str) -> list[tuple[Run, Sequence[dict[str, Any]]]]:
    settings = [Run(method=method, normalizer=n, curriculum=c) for n in NORMALIZERS for c in CURRICULA]
    return [(setting, finished[setting]) for setting in settings if setting in finished]


def _measures(runs: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """Give ``float64[seeds, measures]``, in the order of `_NAMES`."""
    rows = [[*run["measures"]["loss"].values(), *run["measures"]["retrieval"].values()] for run in runs]
    return np.array(rows).reshape(len(rows), len(_NAMES))


def _steps(runs: Sequence[dict[str, Any]], name: str) -> NDArray[np.float64]:
    """Give ``float64[seeds, steps]``, as many steps as the shortest run has: plans differ by a few."""
    shortest = min(len(run["steps"][name]) for run in runs)
    return np.array([run["steps"][name][:shortest] for run in runs])


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    width = min(SMOOTHED_STEPS, values.shape[1])
    return np.array([np.convolve(row, np.full(width, 1 / width), mode="valid") for row in values])


def _spread(values: NDArray[np.float64]) -> str:
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def _verdict(name: str, difference: float, error: float) -> str:
    cell = f"{difference:+.3f} ({abs(difference) / max(error, 1e-9):.1f})"
    if abs(difference) < NOISE * error:
        return cell
    is_better = (difference < 0) == name.startswith("loss")
    return f"**{cell}**" if is_better else f"_{cell}_"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
