"""Faults inside a run: steps that are not finite, memory, disks, signals, and older progress in the way."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed
from tests.helpers import mixed_lengths, recipe_config, run_recipe_job
from tests.ranks import RankError, RankPool

GROUPS = [{"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 512, "cp_degree": 2, "ac_layers": 1}]
LENGTHS = mixed_lengths(60, 512, seed=4)
Ranks = Callable[[int], RankPool]


def make_config(directory: Path, groups: list[dict[str, Any]] = GROUPS, **changes: Any) -> DictConfig:
    planner = {"_component_": "hbp_tune.components.BalancePlanner", "tokens_per_step": 1024}
    return recipe_config(directory, LENGTHS, groups, **({"planner": planner, "max_steps": 6} | changes))


def numbers(steps: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    return [(step["step"], step["loss"], step["grad_norm"]) for step in steps]


def saved(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "out/progress").iterdir())


def bad_steps_job(cfg: DictConfig, happen: Callable[[torch.Tensor], torch.Tensor], steps: list[int]) -> list[dict[str, Any]]:
    """Train; in the given steps, the loss of each of the last rank's packs is what ``happen`` makes of it."""
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    model, forward = recipe._model, recipe._model.forward

    def changed(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = forward(*args, **kwargs)
        return happen(loss) if recipe.rank == recipe.world_size - 1 and recipe.global_step + 1 in steps else loss

    model.forward = changed  # type: ignore[method-assign]
    recipe.train()
    return recipe._metric_logger.steps if recipe.rank == 0 else []


def not_a_number(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def no_memory(loss: torch.Tensor) -> torch.Tensor:
    return loss + torch.empty(2**50).sum()


def test_a_step_that_is_not_finite_is_skipped_and_counted(ranks: Ranks, tmp_path: Path) -> None:
    steps = ranks(2).run(bad_steps_job, make_config(tmp_path), not_a_number, [3])[0]
    assert [step["skipped_steps"] for step in steps] == [0, 0, 1, 1, 1, 1]
    assert [step["loss"] != step["loss"] for step in steps] == [False, False, True, False, False, False]


def test_weights_and_momentum_are_those_of_before_the_skipped_step(ranks: Ranks, tmp_path: Path) -> None:
    """The step after a skipped one has the loss that it would have with the weights of before."""
    same_data = {"planner": {"_component_": "hbp_tune.components.BalancePlanner", "tokens_per_step": 10**6}, "epochs": 3}
    groups = [{"name": "all", "pack_len": 512}]
    whole = ranks(2).run(run_recipe_job, make_config(tmp_path, groups, **same_data))[0]
    skipped = ranks(2).run(bad_steps_job, make_config(tmp_path, groups, **same_data), not_a_number, [2])[0]
    assert len(whole) == len(skipped) == 3
    assert skipped[2]["loss"] == pytest.approx(whole[1]["loss"], rel=1e-6)
    assert skipped[2]["loss"] != pytest.approx(whole[2]["loss"], rel=1e-4)


def test_one_step_too_many_names_the_samples_of_its_bad_packs(ranks: Ranks, tmp_path: Path) -> None:
    message = (
        r"NonFiniteError: loss or gradient norm was not finite in 2 steps of the run, max_nonfinite_steps=1 may be skipped. In "
        r"the last one, the samples of \d+ packs with a loss that is not finite are \d+ \(row \d+ of random_tokens\)"
    )
    cfg = make_config(tmp_path, max_nonfinite_steps=1, save_every_n_steps=1)
    with pytest.raises(RankError, match=message) as raised:
        ranks(2).run(bad_steps_job, cfg, not_a_number, [2, 4])
    assert str(raised.value).count("NonFiniteError: loss") >= 2, "all ranks end by it"
    assert saved(tmp_path) == ["step_3"]


def test_the_count_of_skipped_steps_is_resumed(ranks: Ranks, tmp_path: Path) -> None:
    cfg = make_config(tmp_path, max_nonfinite_steps=1, save_every_n_steps=1)
    ranks(2).run(bad_steps_job, make_config(tmp_path, max_steps=3, save_every_n_steps=1), not_a_number, [2])
    cfg.resume_from_checkpoint = True
    with pytest.raises(RankError, match="was not finite in 2 steps of the run, max_nonfinite_steps=1"):
        ranks(2).run(bad_steps_job, cfg, not_a_number, [5])


def test_zero_stops_at_the_first(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="was not finite in 1 steps of the run, max_nonfinite_steps=0"):
        ranks(2).run(bad_steps_job, make_config(tmp_path, max_nonfinite_steps=0), not_a_number, [2])


def test_running_out_of_memory_names_the_pack_and_what_to_try(ranks: Ranks, tmp_path: Path) -> None:
    groups = [{"name": "all", "pack_len": 512, "ac_layers": 1}]
    message = (
        r"OutOfMemoryError: rank 0 ran out of memory in step 2 of the epoch: group 'all', pack_len=512 \(\d+ tokens in this "
        r"pack\), cp_degree=1, ac_layers=1 of 3, ac_mode=full. Next to try: ac_layers=2 in this group, up to 3. "
        r"\(.*can't allocate memory: you tried to allocate 4503599627370496 bytes"
    )
    with pytest.raises(RankError, match=message):  # alone, for a rank that waited for this one would wait for long
        ranks(1).run(bad_steps_job, make_config(tmp_path, groups), no_memory, [2])


@pytest.mark.parametrize("is_async", [False, True])
def test_saves_that_a_disk_refuses_cost_only_themselves(ranks: Ranks, tmp_path: Path, is_async: bool) -> None:
    cfg = make_config(tmp_path, save_every_n_steps=1, async_save=is_async)
    whole = ranks(2).run(run_recipe_job, make_config(tmp_path / "whole"))[0]
    steps = ranks(2).run(full_disk_job, cfg, [2, 3, 5])[0]
    assert numbers(steps) == numbers(whole)
    assert saved(tmp_path) == ["step_6"]


def full_disk_job(cfg: DictConfig, steps: list[int]) -> list[dict[str, Any]]:
    """Train; rank 1 can write no large file from the given optimizer steps to the next."""
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    save = recipe.save_progress
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_or_not() -> None:
        recipe._progress.settle()
        if recipe.rank == 1:
            limit = 1000 if recipe.global_step in steps else before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        save()

    recipe.save_progress = save_or_not  # type: ignore[method-assign]
    try:
        recipe.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return recipe._metric_logger.steps if recipe.rank == 0 else []


@pytest.mark.parametrize("is_async", [False, True])
def test_the_third_refused_save_in_a_row_ends_the_run(ranks: Ranks, tmp_path: Path, is_async: bool) -> None:
    message = (
        r"SaveError: progress of step 4 could not be saved: \[Errno 27\] File too large \([\d,.]+ MiB free, about "
        r"[\d,.]+ MiB needed\); the newest progress is step_1; it is failure 3 in a row. Free space"
    )
    cfg = make_config(tmp_path, save_every_n_steps=1, async_save=is_async)
    with pytest.raises(RankError, match=message) as raised:
        ranks(2).run(full_disk_job, cfg, [2, 3, 4, 5, 6])
    assert str(raised.value).count("SaveError: progress") >= 2, "all ranks end by it"
    assert saved(tmp_path) == ["step_1"]


def test_a_full_disk_at_the_final_export_is_one_error(ranks: Ranks, tmp_path: Path) -> None:
    message = (
        r"SaveError: the weights could not be exported to .*/out: .*File too large.* MiB needed\); saved "
        r"progress is as it was. Free space, then resume with resume_from_checkpoint=True"
    )
    cfg = make_config(tmp_path, save_every_n_steps=3)
    with pytest.raises(RankError, match=message) as raised:
        ranks(2).run(no_export_job, cfg)
    assert str(raised.value).count("SaveError: the weights") >= 2
    assert saved(tmp_path) == ["step_6"]
    assert not list((tmp_path / "out").glob("epoch_*")), "nothing half-written stays"
    cfg.resume_from_checkpoint = "auto"
    assert ranks(2).run(run_recipe_job, cfg)[0] == []
    assert list((tmp_path / "out/epoch_0").glob("*.safetensors"))


def no_export_job(cfg: DictConfig) -> None:
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    export = recipe.save_checkpoint
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def export_in_vain(epoch: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        export(epoch)

    recipe.save_checkpoint = export_in_vain  # type: ignore[method-assign]
    try:
        recipe.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_ends_the_run_after_the_step_with_its_progress(
    ranks: Ranks, tmp_path: Path, number: signal.Signals
) -> None:
    whole = ranks(2).run(run_recipe_job, make_config(tmp_path / "whole"))[0]
    first = ranks(2).run(signal_job, make_config(tmp_path, async_save=True), number, 3)[0]
    assert numbers(first) == numbers(whole[:3])
    assert saved(tmp_path) == ["step_3"]
    assert not list((tmp_path / "out").glob("epoch_*")), "the run is not over, so that nothing is exported"
    rest = ranks(2).run(run_recipe_job, make_config(tmp_path, resume_from_checkpoint="auto"))[0]
    assert numbers(rest) == numbers(whole[3:])


def signal_job(cfg: DictConfig, number: signal.Signals, step: int) -> list[dict[str, Any]]:
    """Train; rank 1 receives a signal while it computes a step."""
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    before = signal.getsignal(number)
    add = recipe._guard.add

    def add_and_receive(loss: torch.Tensor) -> None:
        add(loss)
        if recipe.rank == 1 and recipe.global_step + 1 == step:
            os.kill(os.getpid(), number)

    recipe._guard.add = add_and_receive  # type: ignore[method-assign]
    recipe.train()
    recipe._stop.restore()
    assert signal.getsignal(number) is before
    return recipe._metric_logger.steps if recipe.rank == 0 else []


def test_a_fresh_run_moves_older_progress_aside(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(run_recipe_job, make_config(tmp_path, save_every_n_steps=3))
    for aside in ("progress_1", "progress_2"):
        ranks(2).run(run_recipe_job, make_config(tmp_path, save_every_n_steps=2, max_steps=2))
        assert saved(tmp_path) == ["step_2"]
        assert (tmp_path / "out" / aside).exists()
    assert [path.name for path in (tmp_path / "out/progress_1").iterdir()] == ["step_6"]


def restarted_job(cfg: DictConfig) -> list[dict[str, Any]]:
    """Train in a process that torchrun has started for the second time."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    try:
        return run_recipe_job(cfg)
    finally:
        del os.environ["TORCHELASTIC_RESTART_COUNT"]


def test_an_elastic_restart_resumes_what_is_saved_and_else_starts(ranks: Ranks, tmp_path: Path) -> None:
    cfg = make_config(tmp_path, save_every_n_steps=2)
    whole = ranks(2).run(restarted_job, make_config(tmp_path, max_steps=4, save_every_n_steps=2))[0]
    assert len(whole) == 4
    rest = ranks(2).run(restarted_job, cfg)[0]
    assert [step["step"] for step in rest] == [5, 6]
