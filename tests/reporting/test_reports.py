import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hbp_tune.planning.comparison.methods import plan_comparison
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.reporting.places import RowPlace
from hbp_tune.reporting.terminal.overlong import report_overlong
from hbp_tune.reporting.terminal.tables import print_plan

GROUPS = (PackingGroup(name="short", pack_len=64), PackingGroup(name="long", pack_len=256, cp_degree=2, ac_layers=3))


def printed(lengths: np.ndarray, width: int, overlong: str = "error", world_size: int = 2) -> str:
    planner = BalancePlanner(overlong=overlong, mode="paper")
    plan = planner.plan(lengths, lengths, GROUPS, world_size=world_size, seed=0)
    compared = plan_comparison(plan, planner, seed=0, cost=CostModel())
    console = Console(file=io.StringIO(), width=width)
    print_plan(plan, lengths, compared=compared, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 120])
def test_a_person_sees_data_plan_and_balance(width: int) -> None:
    text = printed(np.concatenate((np.full(100, 20), np.full(10, 250))).astype(np.int32), width)
    assert "Data: 110 samples, 4,500 tokens" in text
    assert "110 samples placed, each once" in text
    assert "…" not in text, "nothing is cut off"
    assert max(len(line) for line in text.splitlines()) <= width
    for name in ("short", "long", "HBP", "one length", "Balance on 8 ranks", "DBR", "PR", "ABR", "CR", "Ave-T", "idle"):
        assert name in text


def test_what_was_left_out_is_said() -> None:
    lengths = np.array([10, 300, 20], dtype=np.int32)
    assert "2 samples placed, each once, 1 dropped" in printed(lengths, 80, "drop")
    assert "3 samples placed, each once, 1 truncated" in printed(lengths, 80, "truncate")


def test_one_sample_prints() -> None:
    assert "1 samples placed" in printed(np.array([5], dtype=np.int32), 80)


def unknown_places(ids: np.ndarray) -> list[RowPlace]:
    return [RowPlace(dataset="some", row=int(i)) for i in ids]


def test_overlong_samples_are_listed_by_data_set_and_row(tmp_path: Path) -> None:
    lengths = np.array([10, 300, 20, 400, 5], dtype=np.int32)
    places = [RowPlace(dataset="chat", file="a.jsonl", row=1, line=3), RowPlace(dataset="hub", row=7)]
    plan = BalancePlanner(overlong="drop").plan(lengths, lengths, GROUPS, world_size=2, seed=0)
    line = report_overlong(plan, lengths, tmp_path / "new", lambda ids: [places[int(i) // 2] for i in ids])
    assert line == (
        "2 of 5 samples are longer than pack_len=256 of the longest group 'long': the longest has 400 tokens; first rows: 1, 3; "
        f"dropped, all listed in {tmp_path / 'new' / 'overlong.csv'}"
    )
    listed = (tmp_path / "new/overlong.csv").read_text().split()
    assert listed == [
        "sample_id,dataset,file,row,line,num_tokens,what",
        "1,chat,a.jsonl,1,3,300,dropped",
        "3,hub,,7,,400,dropped",
    ]


def test_what_was_drawn_twice_is_counted_twice_and_listed_once(tmp_path: Path) -> None:
    lengths, drawn = np.array([10, 300, 20], dtype=np.int32), np.array([0, 0, 1, 1, 2], dtype=np.int32)
    planner = BalancePlanner(overlong="drop")
    plan = planner.plan(lengths, lengths, GROUPS, world_size=2, seed=0, sample_ids=drawn)
    console = Console(file=io.StringIO(), width=120)
    print_plan(plan, lengths, compared=plan_comparison(plan, planner, seed=0, cost=CostModel()), console=console)
    assert "3 samples placed, 2 different ones, 2 dropped" in console.file.getvalue()  # type: ignore[attr-defined]
    line = report_overlong(plan, lengths, tmp_path, unknown_places)
    assert line is not None
    assert line.startswith("1 of 3 samples are longer than pack_len=256")
    assert (tmp_path / "overlong.csv").read_text().split() == [
        "sample_id,dataset,file,row,line,num_tokens,what",
        "1,some,,1,,300,dropped",
    ]


def test_nothing_overlong_nothing_said(tmp_path: Path) -> None:
    lengths = np.array([10, 20], dtype=np.int32)
    plan = BalancePlanner().plan(lengths, lengths, GROUPS, world_size=2, seed=0)
    assert report_overlong(plan, lengths, tmp_path, unknown_places) is None
    assert list(tmp_path.iterdir()) == []


def cells(text: str, name: str) -> list[str]:
    """Give the cells of the first row that starts with ``name``."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return next(row[1:] for row in rows if row[0] == name)


@pytest.mark.parametrize("width", [80, 120])
def test_figures_by_hand(width: int) -> None:
    # Short: 4 packs of 64 on 4 ranks; long: 250 beside 250 and 6, then the third pack, 250 and 6, dealt out over both.
    text = printed(np.array([64, 64, 64, 64, 250, 250, 250, 6, 6], dtype=np.int32), width, world_size=4)
    assert cells(text, "short") == ["64", "1", "0", "4", "4", "1", "1.0", "256"]
    assert cells(text, "long") == ["256", "2", "3", "5", "4", "2", "1.0", "381"]
    assert cells(text, "HBP") == ["0.1666", "0.1163", "0.1667", "0.7485", "85"]
    assert cells(text, "one length")[3] == "1.0000", "all tokens pay for context parallelism"
    assert [cells(text, name)[0] for name in ("to 128", "to 250")] == ["6", "3"]
    assert [cells(text, name)[1].split()[-1] for name in ("to 128", "to 250")] == ["0.263", "0.737"], "268 and 750 of 1018"
    assert "min 6  median 64  p90 250  p99 250  max 250 tokens" in text


def test_empty_packs_and_groups_count_nothing() -> None:
    text = printed(np.array([5], dtype=np.int32), 80)
    assert cells(text, "short") == ["64", "1", "0", "1", "1", "1", "1.0", "5"], "the other rank's empty pack is not a pack"
    assert cells(text, "long") == ["256", "2", "3", "0", "0", "0", "-", "-"]


@pytest.mark.parametrize("width", [80, 120])
def test_large_figures_stay_whole(width: int) -> None:
    groups = (
        PackingGroup(name="16k", pack_len=16384, ac_layers=28, ac_mode="offload"),
        PackingGroup(name="128k", pack_len=131072, cp_degree=8, ac_layers=29),
    )
    lengths = np.concatenate((np.full(1600, 8192), np.full(20, 131072))).astype(np.int32)
    planner = BalancePlanner(tokens_per_step=1048576)
    plan = planner.plan(lengths, lengths, groups, world_size=8, seed=0)
    console = Console(file=io.StringIO(), width=width)
    compared = plan_comparison(plan, planner, seed=0, cost=CostModel())
    print_plan(plan, lengths, compared=compared, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert cells(text, "16k") == ["16,384", "1", "28o", "1,600", "800", "13", "7.7", "1,008,246"]
    assert "AC: recomputed layers (o: offload)  micro" in text
    assert cells(text, "128k") == ["131,072", "8", "29", "20", "20", "3", "6.7", "873,813"]


def test_truncated_samples_are_listed_at_their_stored_length(tmp_path: Path) -> None:
    lengths, num_targets = np.array([10, 300, 257, 999], dtype=np.int32), np.array([1, 1, 1, 0], dtype=np.int32)
    plan = BalancePlanner(overlong="truncate").plan(lengths, num_targets, GROUPS, world_size=2, seed=0)
    line = report_overlong(plan, lengths, tmp_path, unknown_places)
    assert line is not None
    dropped = "1 dropped, as no target of theirs would be left"
    assert line.endswith(f"; 2 cut by truncate_middle, {dropped}, all listed in {tmp_path / 'overlong.csv'}")
    assert (tmp_path / "overlong.csv").read_text().split()[1:] == [
        "1,some,,1,,300,truncate_middle",
        "2,some,,2,,257,truncate_middle",
        "3,some,,3,,999,dropped",
    ]
