"""The runs that are compared: what varies between them, how each is planned, trained and measured, and where it is kept."""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from quality.corpus import MAX_LEN, Corpus
from quality.measures import measure
from quality.training import SHAPE, Learner
from torch import Tensor
from tqdm import tqdm

from hbp_tune.data import TokenStore
from hbp_tune.demo.model import build
from hbp_tune.models import model_shape
from hbp_tune.planning import ISF, BalancePlanner, CostModel, EpochPlan, PackingGroup, ShortFirst, plan_baseline
from hbp_tune.training import AveTokenLoss, SampleMeanLoss, SumLoss, TokenMeanLoss

WORLD_SIZE = 4
TOKENS_PER_STEP = 8192
LONG = PackingGroup(name="long", pack_len=MAX_LEN, cp_degree=4)
GROUPS = (PackingGroup(name="short", pack_len=2048), LONG)
METHODS = ("isf", "longalign_packing", "longalign_sorted", "hbp_paper", "hbp_cost")
NORMALIZERS = {"sum": SumLoss, "sample_mean": SampleMeanLoss, "token_mean": TokenMeanLoss, "ave_token": AveTokenLoss}
# Steps from the short group alone, as shares of the run: to each other as the 0, 100 and 500 steps of the paper.
CURRICULA = {"none": 0.0, "short": 0.04, "longer": 0.2}
BASE_LR, PEAK_LR = 1e-3, 5e-4


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one fine-tuning run is made of; the seed decides the packs and their order, nothing else.

    Args:
        method: of `METHODS`.
        normalizer: of `NORMALIZERS`.
        curriculum: of `CURRICULA`; only HBP has groups to order.
        seed: of the plan.
    """

    method: str
    normalizer: str = "ave_token"
    curriculum: str = "none"
    seed: int = 0


def default_run(method: str, seed: int = 0) -> Run:
    """Give the run that stands for a method: HBP starts with its short group, the others have one group only."""
    return Run(method=method, curriculum="short" if method.startswith("hbp") else "none", seed=seed)


def plan_run(run: Run, store: TokenStore) -> EpochPlan:
    """Plan a run: its samples are the store's, each once, whatever the method."""
    isf = plan_baseline("isf", store.lengths, LONG, world_size=WORLD_SIZE, seed=run.seed, tokens_per_step=TOKENS_PER_STEP)
    if run.method == "isf":
        return isf
    if run.method == "longalign_sorted":
        # A step is one batch of neighbours in length. Sorted batching counts samples, not tokens: as many ranks, with a sample
        # each, as come to the same number of steps.
        samples_per_step = round(len(store) / isf.num_steps)
        unshared = replace(LONG, cp_degree=1)
        return plan_baseline(run.method, store.lengths, unshared, world_size=samples_per_step, seed=run.seed)
    if run.method == "longalign_packing":
        return plan_baseline(
            run.method, store.lengths, LONG, world_size=WORLD_SIZE, seed=run.seed, tokens_per_step=TOKENS_PER_STEP
        )
    packing = {"mode": "paper", "packer": ISF()} if run.method == "hbp_paper" else {"mode": "cost"}
    with torch.device("meta"):
        cost = CostModel(model_shape(build(SHAPE)))
    return BalancePlanner(TOKENS_PER_STEP, **packing).plan(
        store.lengths,
        store.num_targets_within(MAX_LEN),
        GROUPS,
        world_size=WORLD_SIZE,
        seed=run.seed,
        curriculum=ShortFirst(round(CURRICULA[run.curriculum] * isf.num_steps)),
        cost=cost,
    )


def base_weights(corpus: Corpus, path: Path) -> dict[str, Tensor]:
    """Train the base model, which every run starts from, or read the one at ``path``."""
    if not path.exists():
        learner = Learner()
        for store, pack_len in ((corpus.codes, 1024), (corpus.base, 2048)):
            plan = plan_baseline("isf", store.lengths, PackingGroup(name="base", pack_len=pack_len), world_size=1, seed=0)
            weights = AveTokenLoss().document_weights(plan, store.num_targets_within(pack_len))
            steps = learner.train(store, plan, weights, peak_lr=BASE_LR)
            for step in (bar := tqdm(steps, total=plan.num_steps, desc="base")):
                bar.set_postfix(loss=f"{step.loss:.3f}")
        torch.save(learner.weights(), path)
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def read_runs(path: Path) -> list[tuple[Run, dict[str, Any]]]:
    """Read finished runs and what was kept of each."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(Run(**line.pop("run")), line) for line in lines]


def train_missing(runs: Sequence[Run], corpus: Corpus, work: Path) -> list[tuple[Run, dict[str, Any]]]:
    """Train and measure the runs that are not yet in ``work/runs.jsonl``; each is appended there once it is done.

    Several processes may share the folder: a run that another one has begun is left to it.

    Returns:
        All finished runs of the folder.
    """
    base, path = base_weights(corpus, work / "base.pt"), work / "runs.jsonl"
    (work / "locks").mkdir(exist_ok=True)
    for run in runs:
        with _lock(work / "locks" / "-".join(map(str, asdict(run).values()))) as is_free:
            if is_free and run not in dict(read_runs(path)):
                line = {"run": asdict(run)} | train_run(run, corpus, base)
                with path.open("a") as lines:
                    lines.write(json.dumps(line) + "\n")
    return read_runs(path)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Tell whether no other process holds this file, and hold it meanwhile; a process that ends lets go of it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False


def train_run(run: Run, corpus: Corpus, base: dict[str, Tensor]) -> dict[str, Any]:
    """Train and measure one run.

    Returns:
        The plan's hash, every step as a list for each of its quantities, and what the model was measured by.
    """
    plan = plan_run(run, corpus.train)
    weights = NORMALIZERS[run.normalizer]().document_weights(plan, corpus.train.num_targets_within(MAX_LEN))
    learner = Learner(base)
    steps = learner.train(corpus.train, plan, weights, peak_lr=PEAK_LR)
    kept = [asdict(step) for step in tqdm(steps, total=plan.num_steps, desc=" ".join(map(str, asdict(run).values())))]
    measures = asdict(measure(learner, corpus))
    return {
        "plan": plan.hash[:12],
        "steps": {name: [_short(step[name]) for step in kept] for name in kept[0]},
        "measures": {name: {length: _short(value) for length, value in of.items()} for name, of in measures.items()},
    }


def _short(value: Any) -> Any:
    """Cut a number to five digits, so that files of results stay small."""
    return float(f"{value:.5g}") if isinstance(value, float) else value
