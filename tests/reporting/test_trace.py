import json
from pathlib import Path

import numpy as np
import pytest

from hbp_tune.planning.comparison.simulation import PackWork, simulate
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.reporting.files.trace import write_trace


def test_blocks_of_a_rank_follow_each_other_and_fill_the_first_steps(tmp_path: Path) -> None:
    groups = (PackingGroup(name="short", pack_len=16_384), PackingGroup(name="long", pack_len=65_536, cp_degree=2))
    lengths = np.random.default_rng(0).integers(100, 60_000, 60).astype(np.int32)
    plan = BalancePlanner(tokens_per_step=150_000).plan(lengths, lengths, groups, world_size=4, seed=0)
    simulated = simulate(PackWork.of_plan(plan), CostModel())
    write_trace(tmp_path / "trace.json", plan, simulated, 3)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == [f"rank {rank}" for rank in range(4)]
    starts = plan.micro_step_starts
    last = int(np.searchsorted(plan.pack_step[starts], 3))
    in_first_steps = plan.pack_step < 3
    by_rank = {rank: [event for event in events if event["ph"] == "X" and event["tid"] == rank] for rank in range(4)}
    for blocks in by_rank.values():
        assert {block["args"]["step"] for block in blocks} == {0, 1, 2}
        begins, lasts = (np.array([block[key] for block in blocks]) for key in ("ts", "dur"))
        assert begins == pytest.approx(np.cumsum(lasts) - lasts, abs=1e-3)
        assert lasts.sum() == pytest.approx(1e6 * simulated.micro_step_s[:last].sum())

    def spent_s(name: str) -> float:
        return sum(block["dur"] for blocks in by_rank.values() for block in blocks if block["name"] == name) / 1e6

    exchange_s = (simulated.exchange_s * plan.cp_degrees)[in_first_steps].sum()
    assert spent_s("exchange") == pytest.approx(exchange_s)
    assert spent_s("compute") == pytest.approx((simulated.busy_s * plan.cp_degrees)[in_first_steps].sum() - exchange_s)
    trained = {(block["args"]["tokens"], block["args"]["group"]) for blocks in by_rank.values() for block in blocks}
    names = np.array([group.name for group in groups])[plan.pack_group]
    tokens = plan.sum_per_pack(plan.lengths)
    assert trained == set(zip(tokens[in_first_steps].tolist(), names[in_first_steps].tolist(), strict=True))
