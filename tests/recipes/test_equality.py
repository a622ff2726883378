"""The recipe against one process: loss and gradient norm, step by step, whatever is parallel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed
from tests.helpers import mixed_lengths, plan_of, recipe_config, run_recipe_job, train_reference
from tests.ranks import RankError, RankPool

TWO_RANKS = [
    {"name": "short", "pack_len": 256, "cp_degree": 1, "ac_layers": 1},
    {"name": "long", "pack_len": 1024, "cp_degree": 2, "ac_layers": 2},
]
FOUR_RANKS = [
    {"name": "short", "pack_len": 256, "cp_degree": 1},
    {"name": "middle", "pack_len": 512, "cp_degree": 2, "ac_layers": 3},
    {"name": "long", "pack_len": 1024, "cp_degree": 4, "ac_layers": 1},
]


def assert_same_training(got: list[dict[str, Any]], want: list[dict[str, Any]], *, tolerance: float = 1e-5) -> None:
    assert len(got) == len(want)
    for step, (left, right) in enumerate(zip(got, want, strict=True)):
        for name in ("loss", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=tolerance), f"{name} at step {step}"


@pytest.fixture(scope="module")
def two_rank_run(
    ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, list[dict[str, Any]], Path]:
    directory = tmp_path_factory.mktemp("equality")
    cfg = recipe_config(directory, mixed_lengths(320, 1024, seed=1), TWO_RANKS)
    return cfg, ranks(2).run(run_recipe_job, cfg)[0], directory


def test_two_ranks_train_both_groups_for_twenty_steps(two_rank_run: Any) -> None:
    _, steps, _ = two_rank_run
    assert len(steps) >= 20
    assert {step["cp_degree"] for step in steps} == {1, 2}
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_two_ranks_equal_one_process_with_a_dense_mask(two_rank_run: Any) -> None:
    cfg, steps, _ = two_rank_run
    plan, dataset = plan_of(cfg, world_size=2)
    assert_same_training(steps, train_reference(cfg, plan, dataset))


def test_context_parallel_equals_the_same_plan_without_it(two_rank_run: Any, ranks: Callable[[int], RankPool]) -> None:
    _, steps, directory = two_rank_run
    whole = [{**group, "cp_degree": 1} for group in TWO_RANKS]
    planner = {"_component_": "tests.helpers.OnOneRankPlanner", "cp_degrees": [1, 2], "tokens_per_step": 2048}
    cfg = recipe_config(directory, mixed_lengths(320, 1024, seed=1), whole, planner=planner)
    without = ranks(2).run(run_recipe_job, cfg)[0]
    assert {step["cp_degree"] for step in without} == {1}
    assert_same_training(steps, without)


# The second as torchtune's command line gives context_parallel=all_gather where the file has a component.
@pytest.mark.parametrize("scheme", ["ulysses", {"_component_": "all_gather"}, "auto"], ids=str)
def test_four_ranks_with_repeated_kv_heads_equal_one_process(
    ranks: Callable[[int], RankPool], tmp_path: Path, scheme: Any
) -> None:
    lengths = [*mixed_lengths(60, 1024, seed=2), *range(300, 500, 20)]
    cfg = recipe_config(tmp_path, lengths, FOUR_RANKS, context_parallel=scheme)
    steps = ranks(4).run(run_recipe_job, cfg)[0]
    assert {step["cp_degree"] for step in steps} == {1, 2, 4}
    plan, dataset = plan_of(cfg, world_size=4)
    assert_same_training(steps, train_reference(cfg, plan, dataset))


def placements_job(cfg: DictConfig) -> set[str]:
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    return {str(parameter.placements) for parameter in recipe._model.parameters()}


@pytest.mark.parametrize("sharded", [True, False])
def test_copies_of_the_weights_equal_one_process(ranks: Callable[[int], RankPool], tmp_path: Path, sharded: bool) -> None:
    """Two copies, each over two ranks, under groups of CP degree 1, 2 and 4 and several micro-steps a step."""
    lengths = [*mixed_lengths(60, 1024, seed=2), *range(300, 500, 20)]
    changes = {"fsdp_shard_degree": 2, "fsdp_sharded_accumulation": sharded}
    cfg = recipe_config(tmp_path, lengths, FOUR_RANKS, **changes, save_every_n_steps=3)
    assert ranks(4).run(placements_job, cfg)[0] == {"(Replicate(), Shard(dim=0))"}
    steps = ranks(4).run(run_recipe_job, cfg)[0]
    plan, dataset = plan_of(cfg, world_size=4)
    assert len(plan.micro_step_starts) > plan.num_steps
    assert_same_training(steps, train_reference(cfg, plan, dataset))
    cfg.resume_from_checkpoint = True
    saved = len(steps) - len(steps) % 3
    resumed = ranks(4).run(run_recipe_job, cfg)[0]
    assert [step["loss"] for step in resumed] == [step["loss"] for step in steps[saved:]]


def test_copies_that_do_not_divide_the_ranks_are_refused(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, [100], FOUR_RANKS, fsdp_shard_degree=3)
    with pytest.raises(RankError, match=r"ConfigError: fsdp_shard_degree=3 must divide the 4 ranks; leave it out to shard"):
        ranks(4).run(placements_job, cfg)
