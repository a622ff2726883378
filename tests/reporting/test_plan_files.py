import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hbp_tune.errors import DataError
from hbp_tune.planning.plans.records import EpochPlan
from hbp_tune.planning.plans.truncation import CUTS
from hbp_tune.reporting.files import plan_files
from hbp_tune.reporting.files.plan_files import plan_summary, read_plan, write_plan, write_summary
from hbp_tune.reporting.report import PlanReport

ARRAYS = [field.name for field in dataclasses.fields(EpochPlan) if field.name not in {"groups", "world_size", "cut"}]
COLUMNS = ["epoch", "step", "micro_step", "group", "pack_len", "cp_degree", "first_rank", "pack", "slot", "sample", "length"]


def assert_equal(read: EpochPlan, written: EpochPlan) -> None:
    assert (read.groups, read.world_size, read.cut, read.hash) == (written.groups, written.world_size, written.cut, written.hash)
    for name in ARRAYS:
        found, wanted = getattr(read, name), getattr(written, name)
        assert found.dtype == wanted.dtype, name
        np.testing.assert_array_equal(found, wanted, err_msg=name)


@pytest.mark.parametrize("seed", range(20))
def test_plans_come_back_exactly(draw_plan: Callable[[int], EpochPlan], tmp_path: Path, seed: int) -> None:
    plan = draw_plan(seed)
    left_out = np.random.default_rng(seed).integers(0, 2**31 - 1, (2, seed), dtype=np.int32)
    plan = dataclasses.replace(plan, dropped=left_out[0], truncated=left_out[1], cut=CUTS[seed % 3])
    write_plan(tmp_path / "new" / "plan.parquet", [plan])
    (read,) = read_plan(tmp_path / "new" / "plan.parquet")
    assert_equal(read, plan)


def test_every_epoch_comes_back(by_hand: EpochPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_files, "_ROWS_AT_ONCE", 2)  # several row groups an epoch, and packs across their borders
    other = dataclasses.replace(by_hand, sample_ids=by_hand.sample_ids[::-1].copy())
    dropped = dataclasses.replace(by_hand, dropped=np.array([7, 9], dtype=np.int32))
    plans = (by_hand, other, dropped)
    write_plan(tmp_path / "plan.parquet", plans)
    for read, written in zip(read_plan(tmp_path / "plan.parquet"), plans, strict=True):
        assert_equal(read, written)


def test_plans_written_before_groups_had_modes_recompute_in_full(by_hand: EpochPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    selective = tuple(dataclasses.replace(group, ac_mode="selective") for group in by_hand.groups)
    write_plan(path, [dataclasses.replace(by_hand, groups=selective)])
    assert read_plan(path)[0].groups == selective
    table = pq.read_table(path)
    described = json.loads(table.schema.metadata[b"hbp_tune.plan"])
    for group in described["groups"]:
        del group["ac_mode"]
    metadata = table.schema.metadata | {b"hbp_tune.plan": json.dumps(described).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert_equal(read_plan(path)[0], by_hand)


def test_pandas_reads_every_column(by_hand: EpochPlan, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.parquet", [by_hand, by_hand])
    frame = pd.read_parquet(tmp_path / "plan.parquet")
    assert frame.columns.tolist() == COLUMNS
    assert frame.drop(columns="group").dtypes.astype(str).tolist() == [
        *("int16", "int32", "int16", "int32", "int16", "int32", "int32", "int32", "int32", "int32")
    ]
    assert frame[frame.epoch == 1].drop(columns="epoch").astype({"group": str}).values.tolist() == [
        [0, 0, "short", 64, 1, 0, 0, 0, 0, 60],
        [0, 0, "short", 64, 1, 1, 1, 0, 1, 30],
        [0, 0, "short", 64, 1, 1, 1, 1, 2, 20],
        [0, 1, "short", 64, 1, 0, 2, 0, 3, 40],
        [1, 0, "long", 256, 2, 0, 4, 0, 4, 250],
    ]


def test_long_lists_of_ids_stay_small(by_hand: EpochPlan, tmp_path: Path) -> None:
    many = dataclasses.replace(by_hand, truncated=np.arange(0, 300_000, 3, dtype=np.int32))
    write_plan(tmp_path / "plan.parquet", [many] * 3)
    assert (tmp_path / "plan.parquet").stat().st_size < 20_000
    assert_equal(read_plan(tmp_path / "plan.parquet")[2], many)


@pytest.fixture
def written(by_hand: EpochPlan, tmp_path: Path) -> Path:
    write_plan(tmp_path / "plan.parquet", [by_hand])
    return tmp_path / "plan.parquet"


def edit(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def replace_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no plan at .*plan\.parquet; check the path, or plan again to write it"):
        read_plan(tmp_path / "plan.parquet")


@pytest.mark.parametrize("content", [b"", b"epoch,step\n0,0\n", b"PAR1 and nothing like it PAR1"])
def test_no_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"plan\.parquet is not a parquet file, or a damaged one \(.*\); plan again"):
        read_plan(tmp_path / "plan.parquet")


def test_another_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"length": [1, 2]}), tmp_path / "plan.parquet")
    with pytest.raises(DataError, match=r"is parquet, but no plan: its schema has no 'hbp_tune\.plan'; plan again"):
        read_plan(tmp_path / "plan.parquet")


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column(written: Path, name: str) -> None:
    edit(written, lambda table: table.drop_columns([name]))
    with pytest.raises(DataError, match=rf"has no column '{name}': it is not a whole plan; plan again"):
        read_plan(written)


def test_a_column_of_another_type(written: Path) -> None:
    edit(written, lambda table: table.set_column(9, "sample", table["sample"].cast(pa.int64())))
    with pytest.raises(DataError, match=r"column 'sample' is int64, not int32 without nulls; plan again"):
        read_plan(written)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sample", [0, 1, 2, 4, 3], r"epoch 0 has hash \w{12}, written was \w{12}"),
        ("length", [60, 30, 20, 41, 250], r"epoch 0 has hash \w{12}, written was \w{12}"),
        ("step", [0, 0, 0, 1, 1], r"epoch 0 has hash \w{12}, written was \w{12}"),
        ("micro_step", [0, 0, 0, 0, 0], r"epoch 0 has hash \w{12}, written was \w{12}"),
        ("pack", [0, 1, 1, 3, 4], r"epoch 0 has hash \w{12}, written was \w{12}"),
        ("pack", [4, 3, 2, 1, 0], r"epoch 0 has hash \w{12}, written was \w{12}"),
        ("group", ["long", "short", "short", "short", "long"], r"epoch 0 has hash \w{12}, written was \w{12}"),
        ("group", ["short", "mine", "short", "short", "long"], r"column 'group' of epoch 0 is not what follows from the others"),
        ("first_rank", [0, 1, 1, 1, 0], r"column 'first_rank' of epoch 0 is not what follows from the others"),
        ("slot", [0, 1, 0, 0, 0], r"column 'slot' of epoch 0 is not what follows from the others"),
        ("pack_len", [64, 64, 64, 64, 512], r"column 'pack_len' of epoch 0 is not what follows from the others"),
        ("cp_degree", [1, 1, 1, 1, 1], r"column 'cp_degree' of epoch 0 is not what follows from the others"),
        ("epoch", [0, 0, 0, 0, 1], r"it has rows of other epochs"),
    ],
)
def test_a_changed_file(written: Path, name: str, values: list[Any], message: str) -> None:
    edit(written, lambda table: replace_column(table, name, values))
    with pytest.raises(DataError, match=rf"was changed after it was written: {message}; restore it, or plan again"):
        read_plan(written)


def test_rows_left_out(written: Path) -> None:
    edit(written, lambda table: table.slice(0, 4))
    with pytest.raises(DataError, match=r"was changed after it was written: epoch 0 has hash"):
        read_plan(written)
    edit(written, lambda table: table.slice(0, 0))
    with pytest.raises(DataError, match=r"was changed after it was written: epoch 0 has hash"):
        read_plan(written)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (b"{", r"the metadata of the plan cannot be read \(JSONDecodeError"),
        (b'{"format": 2}', r"the metadata of the plan cannot be read \(KeyError\('groups'\)\); plan again"),
        (b'{"format": 1}', r"holds a plan of format 1, this version reads 2; plan again"),
    ],
)
def test_damaged_metadata(written: Path, plan: bytes, message: str) -> None:
    edit(written, lambda table: table.replace_schema_metadata(table.schema.metadata | {b"hbp_tune.plan": plan}))
    with pytest.raises(DataError, match=message):
        read_plan(written)


def test_figures_by_hand(by_hand: EpochPlan, report_on: Callable[..., PlanReport]) -> None:
    plan = dataclasses.replace(by_hand, dropped=np.array([5, 6], dtype=np.int32), truncated=np.array([4], dtype=np.int32))
    summary = plan_summary(report_on(plan, by_hand, warnings=("mind the gap",)))
    counts = {name: summary[name] for name in ("world_size", "num_samples", "num_tokens", "num_steps", "dropped", "truncated")}
    assert counts == {"world_size": 2, "num_samples": 5, "num_tokens": 400, "num_steps": 2, "dropped": 2, "truncated": 1}
    assert summary["groups"] == [
        {
            **{"name": "short", "pack_len": 64, "cp_degree": 1, "ac_layers": 0, "ac_mode": "full"},
            **{"samples": 4, "packs": 3, "steps": 1, "micro_steps": 2, "tokens": 150},
            **{"tokens_per_step": 150.0, "tokens_per_step_cv": 0.0},
        },
        {
            **{"name": "long", "pack_len": 256, "cp_degree": 2, "ac_layers": 3, "ac_mode": "full"},
            **{"samples": 1, "packs": 1, "steps": 1, "micro_steps": 1, "tokens": 250},
            **{"tokens_per_step": 250.0, "tokens_per_step_cv": 0.0},
        },
    ]
    assert summary["metrics"]["cr"] == 250 / 400
    assert summary["metrics"]["ave_t"] == 400 / (3 * 2)
    assert (summary["hash"], summary["hashes"]) == (plan.hash, [plan.hash, by_hand.hash])
    assert (summary["headline"], summary["warnings"]) == ("This plan is 1.50x as fast.", ["mind the gap"])
    assert (summary["lengths_from"], summary["seconds"]) == ("made up", {"plan": 0.25})


def test_every_metric_of_every_packer(by_hand: EpochPlan, report_on: Callable[..., PlanReport]) -> None:
    report = report_on(by_hand)
    summary = plan_summary(dataclasses.replace(report, baselines={"isf": report.metrics, "ffd": report.metrics}))
    names = ["dbr", "pr", "pr_tail", "abr", "cr", "ave_t", "cbr", "idle", "p99_imbalance", "diversity", "epoch_s"]
    assert list(summary["metrics"]) == names
    assert summary["baselines"] == {"isf": summary["metrics"], "ffd": summary["metrics"]}


def test_tokens_per_step_spread_by_hand(draw_plan: Callable[[int], EpochPlan], report_on: Callable[..., PlanReport]) -> None:
    plan = draw_plan(3)
    for index, group in enumerate(plan_summary(report_on(plan))["groups"]):
        tokens = [
            sum(
                int(plan.lengths[plan.pack_offsets[i] : plan.pack_offsets[i + 1]].sum())
                for i in np.flatnonzero(plan.pack_step == s)
            )
            for s in range(plan.num_steps)
            if plan.pack_group[plan.pack_step == s][0] == index
        ]
        assert group["steps"] == len(tokens) > 0
        assert group["tokens_per_step"] == pytest.approx(np.mean(tokens))
        assert group["tokens_per_step_cv"] == pytest.approx(np.std(tokens) / np.mean(tokens))


def test_what_does_not_exist_is_null(by_hand: EpochPlan, report_on: Callable[..., PlanReport], tmp_path: Path) -> None:
    unused = dataclasses.replace(
        by_hand, groups=(*by_hand.groups, dataclasses.replace(by_hand.groups[1], name="x", pack_len=512))
    )
    report = report_on(unused, seconds={"plan": math.inf}, headline="Zeitgewinn für „lange“ Texte")
    report = dataclasses.replace(report, metrics=dataclasses.replace(report.metrics, diversity=math.nan))
    write_summary(tmp_path / "new" / "plan.json", report)
    text = (tmp_path / "new" / "plan.json").read_text(encoding="utf-8")
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert summary == plan_summary(report)
    assert "Zeitgewinn für „lange“ Texte" in text
    assert summary["metrics"]["diversity"] is None
    assert summary["seconds"] == {"plan": None}
    assert summary["groups"][2]["steps"] == 0
    assert summary["groups"][2]["tokens_per_step"] is None
    assert summary["groups"][2]["tokens_per_step_cv"] is None


def test_a_report_needs_its_baseline(by_hand: EpochPlan, report_on: Callable[..., PlanReport]) -> None:
    with pytest.raises(AssertionError, match=r"the metrics of the naive plan belong into baselines\['isf'\]"):
        report_on(by_hand, baselines={})


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"plan {tmp_path} is a folder; name the file in it, such as {tmp_path}/plan.parquet"):
        read_plan(tmp_path)
