"""Stopping and going on: the same losses, bit for bit, as a run that was never stopped."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed, log
from tests.helpers import mixed_lengths, recipe_config, run_recipe_job
from tests.ranks import RankError, RankPool

GROUPS = [{"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 512, "cp_degree": 2, "ac_layers": 1}]
LENGTHS = mixed_lengths(90, 512, seed=4)
SCHEDULE = {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 3}


def make_config(directory: Path, **changes: Any) -> DictConfig:
    planner = {"_component_": "hbp_tune.components.BalancePlanner", "tokens_per_step": 1024}
    values = {"planner": planner, "lr_scheduler": SCHEDULE, "epochs": 2, "save_every_n_steps": 3}
    return recipe_config(directory, LENGTHS, GROUPS, **(values | changes))


class StoppedError(Exception):
    """Stands for a crash."""


def run_until_crash_job(cfg: DictConfig, step: int) -> None:
    """Train, and die right after an optimizer step, before anything more is saved."""
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    log = recipe._log

    def log_and_die(*args: Any) -> None:
        log(*args)
        if recipe.global_step == step:
            raise StoppedError

    recipe._log = log_and_die  # type: ignore[method-assign]
    try:
        recipe.train()
    except StoppedError:
        return
    raise AssertionError("the run should have been stopped")


def numbers(steps: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    return [(step["step"], step["loss"], step["grad_norm"], step["lr"], step["pack_len"]) for step in steps]


@pytest.fixture(scope="module")
def uninterrupted(ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks(2).run(run_recipe_job, make_config(tmp_path_factory.mktemp("uninterrupted")))[0]


def test_an_epoch_is_long_enough_to_stop_inside(uninterrupted: list[dict[str, Any]]) -> None:
    assert len(uninterrupted) >= 16
    assert {step["cp_degree"] for step in uninterrupted} == {1, 2}


@pytest.mark.parametrize(
    ("crash_step", "num_workers"),
    [(5, 0), (14, 2), pytest.param(5, 2, marks=pytest.mark.slow), pytest.param(14, 0, marks=pytest.mark.slow)],
)
def test_resumed_run_equals_uninterrupted_run(
    ranks: Callable[[int], RankPool], tmp_path: Path, uninterrupted: list[dict[str, Any]], num_workers: int, crash_step: int
) -> None:
    ranks(2).run(run_until_crash_job, make_config(tmp_path, num_workers=num_workers), crash_step)
    resumed = ranks(2).run(run_recipe_job, make_config(tmp_path, num_workers=num_workers, resume_from_checkpoint=True))[0]
    last_saved = crash_step - crash_step % 3
    assert numbers(resumed) == numbers(uninterrupted[last_saved:])


def plan_hash_job(cfg: DictConfig) -> str:
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    return recipe._plan_hashes[0]


def test_a_longer_run_goes_on_by_the_plan_that_it_began_with(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    """A curriculum that lasts a share of the run would order the epoch in progress otherwise, were it told of another length."""
    curriculum = {"_component_": "hbp_tune.components.LinearRamp", "steps": 0.5}
    cfg = make_config(tmp_path, epochs=1, curriculum=curriculum)
    ranks(2).run(run_until_crash_job, cfg, 4)
    longer = OmegaConf.merge(cfg, {"epochs": 2, "resume_from_checkpoint": True})
    begun, resumed = (ranks(2).run(plan_hash_job, each)[0] for each in (cfg | {"output_dir": str(tmp_path / "other")}, longer))
    assert resumed == begun
    fresh = OmegaConf.merge(longer, {"output_dir": str(tmp_path / "fresh"), "resume_from_checkpoint": False})
    assert ranks(2).run(plan_hash_job, fresh)[0] != begun, "a run that is longer from the start is another"


@pytest.mark.parametrize("at_the_end", [True, False], ids=["after the end", "in mid-epoch"])
def test_a_longer_run_has_the_learning_rates_of_one_schedule(
    ranks: Callable[[int], RankPool], tmp_path: Path, at_the_end: bool
) -> None:
    whole = ranks(2).run(run_recipe_job, make_config(tmp_path / "whole", max_steps=9))[0]
    begun = make_config(tmp_path / "longer", max_steps=6)
    if at_the_end:
        ranks(2).run(run_recipe_job, begun)
    else:
        ranks(2).run(run_until_crash_job, begun, 4)
    first = 6 if at_the_end else 3
    resumed = ranks(2).run(run_recipe_job, OmegaConf.merge(begun, {"max_steps": 9, "resume_from_checkpoint": True}))[0]
    assert [step["lr"] for step in resumed] == [step["lr"] for step in whole[first:]]
    assert all(step["lr"] > 0 for step in resumed[:-1])


def lines_of_setup_job(cfg: DictConfig) -> tuple[list[str], list[dict[str, Any]]]:
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    log.removeHandler(handler)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in recipe._optimizer.param_groups]
    return lines, groups


@pytest.mark.parametrize("scheduled", [True, False])
def test_settings_that_differ_are_taken_up_and_said(
    ranks: Callable[[int], RankPool], tmp_path: Path, uninterrupted: list[dict[str, Any]], scheduled: bool
) -> None:
    changes = {} if scheduled else {"lr_scheduler": None}
    ranks(2).run(run_until_crash_job, make_config(tmp_path, **changes), 4)
    cfg = make_config(tmp_path, resume_from_checkpoint=True, clip_grad_norm=0.5, **changes)
    cfg.optimizer |= {"lr": 2e-3, "weight_decay": 0.3}
    lines, groups = ranks(2).run(lines_of_setup_job, cfg)[0]
    assert [line for line in lines if line.endswith("of the saved run")] == [
        "clip_grad_norm=0.5 replaces clip_grad_norm=None of the saved run",
        "optimizer.lr=0.002 replaces optimizer.lr=0.001 of the saved run",
        "optimizer.weight_decay=0.3 replaces optimizer.weight_decay=None of the saved run",
    ]
    assert all(group["weight_decay"] == 0.3 for group in groups)
    assert groups[0]["lr"] == (2 * uninterrupted[3]["lr"] if scheduled else 2e-3)
    # Without changes nothing is said.
    lines, _ = ranks(2).run(lines_of_setup_job, make_config(tmp_path, resume_from_checkpoint=True, **changes))[0]
    assert not [line for line in lines if line.endswith("of the saved run")]


def test_half_written_progress_is_never_the_newest(
    ranks: Callable[[int], RankPool], tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    ranks(2).run(run_until_crash_job, make_config(tmp_path), 4)
    (tmp_path / "out/progress/step_6.tmp/weights").mkdir(parents=True)
    (tmp_path / "out/progress/step_9").mkdir()
    resumed = ranks(2).run(run_recipe_job, make_config(tmp_path, resume_from_checkpoint=True))[0]
    assert numbers(resumed) == numbers(uninterrupted[3:])


def test_only_the_newest_progress_is_kept(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    ranks(2).run(run_recipe_job, make_config(tmp_path, max_steps=9, keep_last_n_checkpoints=2))
    assert sorted(path.name for path in (tmp_path / "out/progress").iterdir()) == ["step_6", "step_9"]


CHANGED = [
    (
        {"groups": [{**GROUPS[0]}, {**GROUPS[1], "pack_len": 1024}]},
        r"groups was .*'pack_len': 512.* and is now .*1024.*set the groups back",
    ),
    ({"lengths": [*LENGTHS[:-1], LENGTHS[-1] - 1]}, r"store_fingerprint was [0-9a-f]{32} and is now [0-9a-f]{32}; the data set"),
    ({"tokens_per_step": 2048}, r"its plan was [0-9a-f]{12} and is now [0-9a-f]{12}; set planner and curriculum back"),
    ({"output_dir": "elsewhere"}, r"no saved progress in .*elsewhere/progress; check output_dir"),
]


@pytest.mark.parametrize(("change", "message"), CHANGED, ids=[next(iter(change)) for change, _ in CHANGED])
def test_resuming_another_run_is_refused(
    ranks: Callable[[int], RankPool], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    ranks(2).run(run_until_crash_job, make_config(tmp_path), 4)
    cfg = make_config(tmp_path, resume_from_checkpoint=True)
    if "groups" in change:
        cfg.groups = recipe_config(tmp_path, LENGTHS, change["groups"]).groups
    elif "lengths" in change:
        cfg.dataset.lengths = change["lengths"]
    elif "tokens_per_step" in change:
        cfg.planner.tokens_per_step = change["tokens_per_step"]
    else:
        cfg.output_dir = str(tmp_path / change["output_dir"])
    with pytest.raises(RankError, match=message):
        ranks(2).run(run_recipe_job, cfg)


def test_another_world_size_is_refused(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    ranks(2).run(run_until_crash_job, make_config(tmp_path), 4)
    with pytest.raises(RankError, match=r"world_size was 2 and is now 4; start as many ranks as before"):
        ranks(4).run(run_recipe_job, make_config(tmp_path, resume_from_checkpoint=True))


def test_recomputed_layers_may_change_in_mid_epoch(
    ranks: Callable[[int], RankPool], tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    ranks(2).run(run_until_crash_job, make_config(tmp_path), 4)
    cfg = make_config(tmp_path, resume_from_checkpoint=True)
    for group in cfg.groups:
        group.ac_layers, group.ac_mode = 3, "selective"
    assert numbers(ranks(2).run(run_recipe_job, cfg)[0]) == numbers(uninterrupted[3:])


def test_a_saved_seed_replaces_the_configured_one(
    ranks: Callable[[int], RankPool], tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    ranks(2).run(run_until_crash_job, make_config(tmp_path), 4)
    resumed = ranks(2).run(run_recipe_job, make_config(tmp_path, resume_from_checkpoint=True, seed=None))[0]
    assert numbers(resumed) == numbers(uninterrupted[3:])


def test_resuming_a_finished_run_trains_nothing(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = make_config(tmp_path, max_steps=3)
    ranks(2).run(run_recipe_job, cfg)
    assert ranks(2).run(run_recipe_job, OmegaConf.merge(cfg, {"resume_from_checkpoint": True}))[0] == []
