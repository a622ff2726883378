"""What the recipe logs at each step, beside the plan and what the names promise."""

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from hbp_tune.planning import CostModel, StepMetrics, measure_steps
from tests.helpers import mixed_lengths, plan_of, recipe_config, run_recipe_job
from tests.ranks import RankPool

GROUPS = [{"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 512, "cp_degree": 2, "ac_layers": 1}]


@pytest.fixture(scope="module")
def run(
    ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory
) -> tuple[DictConfig, list[dict[str, Any]], StepMetrics]:
    planner = {"_component_": "hbp_tune.components.BalancePlanner", "tokens_per_step": 1024}
    directory = tmp_path_factory.mktemp("telemetry")
    cfg = recipe_config(directory, mixed_lengths(90, 512, seed=4), GROUPS, planner=planner, epochs=2)
    steps = ranks(2).run(run_recipe_job, cfg)[0]
    plans = [plan_of(cfg, world_size=2, epoch=epoch)[0] for epoch in (0, 1)]
    return (
        cfg,
        steps,
        StepMetrics.joined([measure_steps(plan, CostModel()) for plan in plans], [plan.num_steps for plan in plans]),
    )


def test_planned_figures_are_those_of_the_plan_over_all_epochs(run: Any) -> None:
    _, logged, planned = run
    assert len(logged) == len(planned) >= 16
    assert [step["num_tokens"] for step in logged] == planned.tokens.tolist()
    assert [step["pack_len"] for step in logged] == [GROUPS[group]["pack_len"] for group in planned.group]
    for name in ("abr", "dbr", "pr", "cr"):
        assert [step[name] for step in logged] == getattr(planned, name).tolist()
    assert {step["cr"] for step in logged} == {0.0, 1.0}


def test_measured_figures_lie_within_their_bounds(run: Any) -> None:
    _, logged, _ = run
    for step in logged:
        assert 0.0 <= step["idle_ratio"] < 1.0
        assert step["slowest_rank"] in (0, 1)
        assert 0.0 < step["data_wait_s"] < step["step_s"]
        assert step["host_memory_gib"] > 0.05
        assert step["tokens_per_second_per_gpu"] == pytest.approx(step["num_tokens"] / step["step_s"] / 2)
        assert step.keys().isdisjoint({"mfu", "peak_memory_gib_short", "peak_memory_gib_long"}), "on a CPU"


def test_the_loss_of_a_group_is_its_latest(run: Any) -> None:
    _, logged, planned = run
    latest: dict[str, float] = {}
    for step, group in zip(logged, planned.group, strict=True):
        latest[f"loss_{GROUPS[group]['name']}"] = step["loss"]
        assert {name: value for name, value in step.items() if name.startswith("loss_")} == latest


def test_time_left_ends_at_zero(run: Any) -> None:
    _, logged, _ = run
    assert "time_left_s" not in logged[0]
    assert all(step["time_left_s"] > 0 for step in logged[1:-1])
    assert logged[-1]["time_left_s"] == 0.0


def test_steps_between_those_that_are_logged_go_unlogged(ranks: Callable[[int], RankPool], run: Any) -> None:
    cfg, logged, _ = run
    steps = ranks(2).run(run_recipe_job, OmegaConf.merge(cfg, {"log_every_n_steps": 5}))[0]
    assert [step["step"] for step in steps] == list(range(5, len(logged) + 1, 5))
    assert [step["loss"] for step in steps] == [step["loss"] for step in logged[4::5]]
