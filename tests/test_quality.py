"""The quality benchmark: its generated data, its serial training of a plan for many ranks, and its tables."""

import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quality.needles import CODES_PER_KEY, NeedleChats, make_codes
from quality.plots import Panel, draw
from quality.report import by_setting, methods_table, normalizer_curves, verdicts_table
from quality.runs import METHODS, NORMALIZERS, Run, default_run, plan_run
from quality.training import lr_share, on_one_rank

from hbp_tune.planning import BalancePlanner, EpochPlan, PackingGroup
from hbp_tune.training import AveTokenLoss

ROOT = Path(__file__).parents[1]
KEYS = ("river", "city", "tree")


class Lengths:
    """What planning asks of a token store."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths.astype(np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def num_targets_within(self, max_len: int) -> np.ndarray:
        return np.minimum(self.lengths, max_len) - 1


def some_lengths(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate((rng.integers(20, 500, 150), rng.integers(500, 8192, 12)))


def test_codes_are_no_words_of_the_text() -> None:
    codes = make_codes(KEYS, "Zaza went to zavu .")
    every = [code for some in codes.values() for code in some]
    assert len(set(every)) == len(KEYS) * CODES_PER_KEY
    assert not {"zaza", "zavu"} & set(every)


def test_each_needle_is_in_the_text_once_and_asked_for_once() -> None:
    codes = make_codes(KEYS, "")
    filler = [f"Sentence {index} is here." for index in range(40)]
    maker = NeedleChats(codes, filler, lambda text: len(text.split()), seed=0)
    for num_tokens, has_filler in ((0, False), (200, True)):
        chat = maker.chat(num_tokens, 3)
        assert [message["role"] for message in chat] == ["user", "assistant"]
        text, answer = (message["content"] for message in chat)
        assert ("Sentence" in text) is has_filler
        answers = [pair.split() for pair in answer.removeprefix("Codes: ").removesuffix(".").split(", ")]
        assert sorted(key for key, _ in answers) == sorted(KEYS)
        assert all(code in codes[key] and text.count(f"The {key} is {code}.") == 1 for key, code in answers)
        assert text.endswith(f"Codes of {', '.join(key for key, _ in answers)}?")
        words = sum(len(message["content"].split()) for message in chat)
        assert not has_filler or 100 < words <= 200


def trained(plan: EpochPlan) -> list[tuple[int, str, list[int]]]:
    """Give step, group and samples of each pack that holds some."""
    spans = zip(plan.pack_offsets[:-1], plan.pack_offsets[1:], strict=True)
    packs = [plan.sample_ids[start:stop].tolist() for start, stop in spans]
    names = [plan.groups[group].name for group in plan.pack_group]
    return [pack for pack in zip(plan.pack_step.tolist(), names, packs, strict=True) if pack[2]]


@pytest.mark.parametrize("seed", range(3))
def test_one_rank_trains_the_packs_of_many_step_by_step(seed: int) -> None:
    groups = (PackingGroup(name="short", pack_len=1024), PackingGroup(name="long", pack_len=8192, cp_degree=4))
    store = Lengths(some_lengths(seed))
    targets = store.num_targets_within(8192)
    plan = BalancePlanner(32768, mode="paper").plan(store.lengths, targets, groups, world_size=8, seed=seed)
    serial = on_one_rank(plan)
    assert trained(serial) == trained(plan)
    packs = list(serial.for_rank(0))
    assert len(packs) == len(trained(plan))  # every pack whole, the empty ones left out
    last = [pack.step for pack in packs if pack.is_last_micro_step]
    assert last == list(range(plan.num_steps))
    # The weights of the plan for many ranks belong to the same samples in the serial one.
    np.testing.assert_array_equal(
        AveTokenLoss().document_weights(serial, targets), AveTokenLoss().document_weights(plan, targets)
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_same_samples_in_about_as_many_steps(method: str) -> None:
    store = Lengths(some_lengths(0))
    plan = plan_run(default_run(method), store)
    assert sorted(plan.sample_ids.tolist()) == list(range(len(store)))
    isf = plan_run(default_run("isf"), store)
    assert plan.num_steps == pytest.approx(isf.num_steps, rel=0.3)
    assert plan.hash != plan_run(default_run(method, seed=1), store).hash or method == "longalign_sorted"


def test_sorted_batches_are_neighbours_in_length() -> None:
    store = Lengths(some_lengths(0))
    plan = plan_run(default_run("longalign_sorted"), store)
    step_of_sample = plan.pack_step[plan.pack_of_sample]
    spans = sorted(
        (plan.lengths[step_of_sample == step].min(), plan.lengths[step_of_sample == step].max()) for step in range(plan.num_steps)
    )
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(spans))


def test_curricula_begin_with_the_short_group() -> None:
    store = Lengths(some_lengths(0))
    longer = plan_run(Run(method="hbp_cost", curriculum="longer"), store)
    first = round(0.2 * plan_run(default_run("isf"), store).num_steps)
    assert first > 1
    assert set(longer.step_groups[:first]) == {0}
    assert set(plan_run(Run(method="hbp_cost"), store).step_groups[: first + 1]) == {0, 1}


def test_learning_rate_by_hand() -> None:
    shares = [lr_share(step, 100) for step in range(100)]
    assert shares[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert shares[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(shares[4:]))


def finished(run: Run, loss: float, retrieval: float) -> tuple[Run, dict[str, Any]]:
    measures = {"loss": {str(n): loss for n in range(5)}, "retrieval": {str(n): retrieval for n in range(4)}}
    steps = {"loss": [3.0, 2.0, 1.0, 1.0, loss], "grad_norm": [1.0, 2.0, 1.0, 1.0, 5.0]}
    return run, {"steps": steps, "measures": measures}


def test_tables_by_hand() -> None:
    runs = [finished(default_run("isf", seed), 1.0 + 0.1 * seed, 0.5) for seed in (1, 0, 2)]
    runs += [finished(default_run("hbp_cost", seed), 0.5 + 0.1 * seed, 0.5) for seed in range(3)]
    runs += [finished(default_run("hbp_paper", seed), 1.7 + 0.1 * seed, 0.25 * seed) for seed in range(3)]
    settings = by_setting(runs)
    isf, paper, cost = methods_table(settings).splitlines()[2:]
    assert isf.startswith("| isf | 3 | 1.100 ± 0.100 | ")
    assert isf.endswith(" | 0.500 ± 0.000 |")
    assert (paper.split(" | ")[0], cost.split(" | ")[0]) == ("| hbp_paper", "| hbp_cost")
    paper, cost = verdicts_table(settings).splitlines()[2:]
    # Variances are 0.01 of all losses, and 0, 0 and 0.0625 of the retrieval: 0.0208 together. Errors are sqrt(2 / 3 * variance).
    assert cost.startswith("| hbp_cost | **-0.500 (6.1)** | ")
    assert paper.startswith("| hbp_paper | _+0.700 (8.6)_ | ")
    assert cost.endswith(" | +0.000 (0.0) |")
    assert paper.endswith(" | _-0.250 (2.1)_ |")


def test_curves_hold_every_normaliser() -> None:
    runs = [finished(Run(method="hbp_cost", normalizer=name, seed=seed), 1.0, 0.5) for name in NORMALIZERS for seed in range(2)]
    picture = normalizer_curves(by_setting(runs), "none")
    assert picture.count("<polyline") == 2 * len(NORMALIZERS)
    assert all(f">{name}</text>" in picture for name in NORMALIZERS)


def test_a_curve_by_hand() -> None:
    picture = draw([Panel(title="a < b", y_label="y", curves={"one": np.array([[0.0, 10.0], [10.0, 10.0]])})])
    assert "a &lt; b" in picture
    assert '<polyline points="0.0,130.0 460.0,0.0"' in picture  # the mean, 5 of 10, in the middle of the height
    picture = draw([Panel(title="", y_label="", curves={"one": np.array([[1.0, 10.0, 100.0]])}, is_log=True)])
    assert '<polyline points="0.0,260.0 230.0,130.0 460.0,0.0"' in picture
    assert ">10</text>" in picture


def write_chats(folder: Path) -> None:
    """Write as few chats of every length as the small benchmark needs, from this repository's text."""
    text = "".join(path.read_text() for path in sorted((ROOT / "hbp_tune").rglob("*.py")))
    sizes = [300] * 16 + [2000] * 4 + [4000] * 4 + [8500] * 4 + [17000] * 4
    starts = np.cumsum([0, *sizes])
    rows = []
    for start, stop in itertools.pairwise(starts):
        turns = text[start : (start + stop) // 2], text[(start + stop) // 2 : stop]
        rows.append(
            {"messages": [{"role": role, "content": turn} for role, turn in zip(("user", "assistant"), turns, strict=True)]}
        )
    for name, part in (("short", rows[:16]), ("long", rows[16:])):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)


@pytest.mark.slow
def test_small_runs_are_trained_measured_and_not_repeated(tmp_path: Path) -> None:
    write_chats(tmp_path)

    def bench(name: str, *more: str) -> str:
        command = [f"benchmarks/{name}.py", "--data", str(tmp_path), "--work", str(tmp_path / "work"), "--small", "--seeds", "1"]
        result = subprocess.run(
            [sys.executable, *command, *more], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    table = bench("bench_quality")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:7]] == [f"| {method}" for method in METHODS]
    assert bench("bench_quality") == table
    lines = [json.loads(line) for line in (tmp_path / "work" / "runs.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines] == [vars(default_run(method)) for method in METHODS]
    assert all(0 <= share <= 1 for line in lines for share in line["measures"]["retrieval"].values())
    assert all(loss > 0 for line in lines for loss in line["measures"]["loss"].values())
