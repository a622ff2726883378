"""What settings do, seen in the numbers of a run."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed
from tests.helpers import mixed_lengths, plan_of, recipe_config, run_recipe_job, train_reference
from tests.ranks import RankPool

GROUPS = [{"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 512, "cp_degree": 2, "ac_layers": 1}]
LENGTHS = mixed_lengths(140, 512, seed=7)


def test_gradients_are_clipped_as_torchtune_clips_them(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, LENGTHS, GROUPS, clip_grad_norm=0.2)
    steps = ranks(2).run(run_recipe_job, cfg)[0]
    assert max(step["grad_norm"] for step in steps) > 0.2, "the norm is logged before clipping"
    reference = train_reference(cfg, *plan_of(cfg, world_size=2))
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in reference], rel=1e-5)
    unclipped = train_reference(recipe_config(tmp_path, LENGTHS, GROUPS), *plan_of(cfg, world_size=2))
    assert steps[-1]["loss"] != pytest.approx(unclipped[-1]["loss"], rel=1e-5)


def test_schedule_spans_the_planned_steps_of_all_epochs(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    schedule = {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 2}
    steps = ranks(2).run(run_recipe_job, recipe_config(tmp_path, LENGTHS, GROUPS, epochs=2, lr_scheduler=schedule))[0]
    rates = [step["lr"] for step in steps]
    assert rates[:3] == [0.0, 5e-4, 1e-3]
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))
    assert 0 < rates[-1] < 0.15 * 1e-3


def test_max_steps_counts_over_epochs(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, LENGTHS, GROUPS, epochs=5)
    per_epoch = plan_of(cfg, world_size=2)[0].num_steps
    cfg.max_steps = per_epoch + 1
    assert [step["step"] for step in ranks(2).run(run_recipe_job, cfg)[0]] == list(range(1, per_epoch + 2))


def test_curriculum_starts_short_and_every_planned_step_happens(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    curriculum = {"_component_": "hbp_tune.components.ShortFirst", "steps": 3}
    cfg = recipe_config(tmp_path, [*LENGTHS, *[60] * 80], GROUPS)
    plain = ranks(2).run(run_recipe_job, cfg)[0]
    ordered = ranks(2).run(run_recipe_job, OmegaConf.merge(cfg, {"curriculum": curriculum}))[0]
    assert [step["pack_len"] for step in ordered[:3]] == [128] * 3
    assert sorted(s["num_tokens"] for s in ordered) == sorted(s["num_tokens"] for s in plain)


def test_a_list_of_data_sets_and_a_stock_loss(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    sets = [
        {"_component_": "tests.helpers.random_tokens", "lengths": part, "seed": i}
        for i, part in enumerate((LENGTHS[:30], LENGTHS[30:]))
    ]
    loss = {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}
    steps = ranks(2).run(run_recipe_job, recipe_config(tmp_path, [], GROUPS, dataset=sets, loss=loss))[0]
    assert sum(step["num_tokens"] for step in steps) == sum(LENGTHS)


def dtypes_job(cfg: DictConfig) -> tuple[list[dict[str, Any]], set[torch.dtype]]:
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    recipe.train()
    return (recipe._metric_logger.steps if recipe.rank == 0 else []), {p.dtype for p in recipe._model.parameters()}


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        pytest.param({"dtype": "bf16"}, torch.bfloat16, id="bf16"),
        pytest.param(
            {"dtype": "fp32", "compute_dtype": "bf16"}, torch.float32, id="bf16 with fp32 master weights", marks=pytest.mark.slow
        ),
    ],
)
def test_half_precision_stays_near_single(
    ranks: Callable[[int], RankPool], tmp_path: Path, settings: dict[str, str], weights: torch.dtype
) -> None:
    cfg = recipe_config(tmp_path, LENGTHS, GROUPS, **settings)
    steps, dtypes = ranks(2).run(dtypes_job, cfg)[0]
    assert dtypes == {weights}
    reference = train_reference(cfg, *plan_of(cfg, world_size=2))
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in reference], rel=1e-2)


def test_what_is_logged_at_each_step(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    step = ranks(2).run(run_recipe_job, recipe_config(tmp_path, LENGTHS, GROUPS, max_steps=1))[0][0]
    trained = {"step", "loss", "lr", "grad_norm", "tokens_per_second_per_gpu", "num_tokens", "pack_len", "cp_degree"}
    assert trained | {"skipped_steps"} <= step.keys()
    assert step["tokens_per_second_per_gpu"] > 0


def test_a_profiler_as_torchtunes_configurations_have_it(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    """Its folder is named by another key of the file."""
    profiler = {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False, "output_dir": "${output_dir}/traces"}
    for node in (profiler, {"enabled": False, "output_dir": "${output_dir}/traces"}):
        cfg = recipe_config(tmp_path, LENGTHS, GROUPS, max_steps=1, profiler=node)
        assert len(ranks(2).run(run_recipe_job, cfg)[0]) == 1
