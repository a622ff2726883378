import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hbp_tune.components.planning.planner import BalancePlanner, compare_with_naive
from hbp_tune.components.planning.records import PackingGroup
from hbp_tune.components.reporting.overlong import report_overlong
from hbp_tune.components.reporting.tables import print_plan
from hbp_tune.components.training.telemetry import tokens_per_step

GROUPS = (PackingGroup(name="short", pack_len=64), PackingGroup(name="long", pack_len=256, cp_degree=2, ac_layers=3))


def printed(lengths: np.ndarray, width: int, overlong: str = "error") -> str:
    planner = BalancePlanner(overlong=overlong)
    plan = planner.plan(lengths, lengths, GROUPS, world_size=2, seed=0)
    compared = compare_with_naive(planner, lengths, GROUPS, world_size=2, seed=0)
    console = Console(file=io.StringIO(), width=width)
    print_plan(plan, lengths, tokens_per_step=tokens_per_step(plan), compared=compared, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 120])
def test_a_person_sees_data_plan_and_balance(width: int) -> None:
    text = printed(np.concatenate((np.full(100, 20), np.full(10, 250))).astype(np.int32), width)
    assert "Data: 110 samples, 4,500 tokens" in text
    assert "110 samples placed, each once" in text
    assert "…" not in text, "nothing is cut off"
    assert max(len(line) for line in text.splitlines()) <= width
    for name in ("short", "long", "HBP", "one length", "HBP on 8 ranks", "DBR", "PR", "ABR", "CR", "Ave-T"):
        assert name in text


def test_what_was_left_out_is_said() -> None:
    lengths = np.array([10, 300, 20], dtype=np.int32)
    assert "2 samples placed, each once, 1 dropped" in printed(lengths, 80, "drop")
    assert "3 samples placed, each once, 1 truncated" in printed(lengths, 80, "truncate")


def test_one_sample_prints() -> None:
    assert "1 samples placed" in printed(np.array([5], dtype=np.int32), 80)


def test_overlong_samples_are_listed_by_data_set_and_row(tmp_path: Path) -> None:
    lengths = np.array([10, 300, 20, 400, 5], dtype=np.int32)
    sources = np.array([0, 0, 1, 1, 1], dtype=np.int16)
    plan = BalancePlanner(overlong="drop").plan(lengths, lengths, GROUPS, world_size=2, seed=0)
    line = report_overlong(plan, lengths, sources, tmp_path / "new")
    assert line == (
        "2 of 5 samples are longer than pack_len=256 of the longest group 'long': the longest has 400 tokens; first rows: 1, 3; "
        f"dropped, all listed in {tmp_path / 'new' / 'overlong.csv'}"
    )
    assert (tmp_path / "new/overlong.csv").read_text().split() == ["sample_id,dataset,row,num_tokens", "1,0,1,300", "3,1,1,400"]


def test_nothing_overlong_nothing_said(tmp_path: Path) -> None:
    lengths = np.array([10, 20], dtype=np.int32)
    plan = BalancePlanner().plan(lengths, lengths, GROUPS, world_size=2, seed=0)
    assert report_overlong(plan, lengths, np.zeros(2, dtype=np.int16), tmp_path) is None
    assert list(tmp_path.iterdir()) == []
