"""Validation in the recipe: equal to one process on each document alone, and no trace of it in training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf

from hbp_tune.demo.model import build
from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed
from tests.helpers import SHAPE, mixed_lengths, random_tokens, recipe_config, stock_weights
from tests.ranks import RankError, RankPool

SOURCES = [
    {"lengths": [100, 1024, 1025, 1900, 3, 640], "seed": 5},
    {"lengths": [2048, 50, 60, 70, 1500], "seed": 6},
]
LABELS = ("letters", "books")
HELD_OUT = [
    {"_component_": "tests.helpers.random_tokens", "label": label, **source}
    for label, source in zip(LABELS, SOURCES, strict=True)
]
SHORT = {"name": "short", "pack_len": 512}
GROUPS = {
    1: [SHORT, {"name": "long", "pack_len": 2048}],
    2: [SHORT, {"name": "long", "pack_len": 2048, "cp_degree": 2, "ac_layers": 2}],
    4: [SHORT, {"name": "middle", "pack_len": 1024, "cp_degree": 2}, {"name": "long", "pack_len": 2048, "cp_degree": 4}],
}
LENGTHS = mixed_lengths(40, 2048, seed=7)


def make_config(directory: Path, world_size: int, **changes: Any) -> DictConfig:
    return recipe_config(directory, LENGTHS, GROUPS[world_size], **({"dataset_val": HELD_OUT} | changes))


def validate_job(cfg: DictConfig) -> dict[str, float]:
    """Validate before any training."""
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    assert recipe._validator is not None
    return recipe._validator.run(recipe._model, recipe._switch, recipe._device)


@torch.no_grad()
def reference(cfg: DictConfig) -> dict[str, float]:
    """Mean losses of torchtune's stock model on each document by itself, in one process."""
    model = build(SHAPE)
    model.load_state_dict(stock_weights(cfg))
    losses: dict[str, list[torch.Tensor]] = {}
    for label, node in zip(LABELS, SOURCES, strict=True):
        for sample in random_tokens(None, **node):
            logits = model(torch.tensor(sample["tokens"])[None])[0, :-1]
            labels = torch.tensor(sample["labels"][1:], dtype=torch.long)
            targets = labels != -100
            bucket = "len_1024" if len(sample["tokens"]) <= 1024 else "len_2048"
            for name in ("val_loss", f"val_loss_{bucket}", f"val_loss_{label}"):
                losses.setdefault(name, []).append(F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)[targets])
    return {name: torch.cat(parts).mean().item() for name, parts in losses.items()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_losses_by_length_and_source_equal_one_process(ranks: Callable[[int], RankPool], tmp_path: Path, world_size: int) -> None:
    cfg = make_config(tmp_path, world_size)
    results = ranks(world_size).run(validate_job, cfg)
    assert all(result == results[0] for result in results)
    assert results[0] == pytest.approx(reference(cfg), rel=1e-5)
    assert results[0].keys() == {"val_loss", "val_loss_len_1024", "val_loss_len_2048", "val_loss_letters", "val_loss_books"}


def train_job(cfg: DictConfig) -> tuple[list[dict[str, Any]], torch.Tensor, list[torch.Tensor], set[bool]]:
    """Train; give what was logged, the random state, this rank's weights, and the modes of all modules."""
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    recipe.train()
    weights = [parameter.to_local().detach().clone() for parameter in recipe._model.parameters()]
    steps = recipe._metric_logger.steps if recipe.rank == 0 else []
    return steps, torch.get_rng_state(), weights, {module.training for module in recipe._model.modules()}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="default"),
        pytest.param({"fsdp_reshard_after_forward": False, "num_workers": 1}, id="kept", marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_with_and_without_validation(
    ranks: Callable[[int], RankPool], tmp_path: Path, settings: dict[str, Any]
) -> None:
    cfg = make_config(tmp_path, 2, max_steps=5, **settings)
    with_validation = ranks(2).run(train_job, OmegaConf.merge(cfg, {"run_val_every_n_steps": 2}))
    without = ranks(2).run(train_job, OmegaConf.merge(cfg, {"dataset_val": None}))
    steps = with_validation[0][0]
    assert [step["step"] for step in steps if "val_loss" in step] == [2, 4, 5]
    names = ("step", "loss", "grad_norm", "lr", "pack_len")
    trained = [[[step[name] for name in names] for step in run[0][0] if "loss" in step] for run in (with_validation, without)]
    assert trained[0] == trained[1]
    assert {pack_len for *_, pack_len in trained[0]} == {512, 2048}
    for (_, rng, weights, modes), (_, plain_rng, plain_weights, plain_modes) in zip(with_validation, without, strict=True):
        assert torch.equal(rng, plain_rng)
        assert modes == plain_modes == {True}
        assert all(torch.equal(x, y) for x, y in zip(weights, plain_weights, strict=True))


def test_null_on_the_command_line_turns_validation_off(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    # torchtune takes dataset_val=null for dataset_val._component_=null where the file has a component.
    cfg = make_config(tmp_path, 2, max_steps=1, dataset_val={**HELD_OUT[0], "_component_": None})
    steps = ranks(2).run(train_job, cfg)[0][0]
    assert [step["step"] for step in steps] == [1]


def test_the_end_of_the_run_is_validated_by_default(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = make_config(tmp_path, 2, max_steps=3, dataset_val=HELD_OUT[0])
    steps = ranks(2).run(train_job, cfg)[0][0]
    assert [step["step"] for step in steps] == [1, 2, 3, 3]
    assert steps[-1].keys() == {"step", "val_loss", "val_loss_len_1024", "val_loss_len_2048"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_val": None, "run_val_every_n_steps": 5}, r"run_val_every_n_steps=5 needs held-out data: set dataset_val, or"),
        ({"run_val_every_n_steps": 0}, r"run_val_every_n_steps=0 must be a whole number of at least 1, or null"),
        (
            {"dataset_val": {**HELD_OUT[0], "lengths": [10, 3000]}},
            r"PackingError: dataset_val: sample 1 has 3000 tokens, group 'long' holds 2048.*planner.overlong=drop",
        ),
        ({"dataset_val": {**HELD_OUT[0], "lengths": [1, 1]}}, r"no target: no token counts toward the loss"),
        ({"dataset_val": [{**HELD_OUT[0], "packed": True}]}, r"dataset_val: packed=True is not supported here"),
    ],
    ids=["no data", "never", "overlong", "no target", "packed"],
)
def test_mistakes_are_explained(ranks: Callable[[int], RankPool], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match=message):
        ranks(2).run(validate_job, make_config(tmp_path, 2, **changes))


def test_overlong_held_out_samples_follow_the_planner(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    losses = {}
    for overlong in ("drop", "truncate"):
        planner = {"_component_": "hbp_tune.components.BalancePlanner", "overlong": overlong}
        held_out = {**HELD_OUT[0], "lengths": [10, 3000]}
        losses[overlong] = ranks(2).run(validate_job, make_config(tmp_path, 2, planner=planner, dataset_val=held_out))[0]
    assert losses["drop"].keys() == {"val_loss", "val_loss_len_1024"}
    assert losses["truncate"].keys() == {"val_loss", "val_loss_len_1024", "val_loss_len_2048"}
