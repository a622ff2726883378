"""Each loss normaliser, over ranks, shards and micro-steps, against its formula in one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import TokenLosses, mixed_lengths, plan_of, recipe_config, run_recipe_job, train_reference
from tests.ranks import RankPool

GROUPS = {
    1: [{"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 384}],
    2: [{"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 384, "cp_degree": 2}],
    4: [{"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 384, "cp_degree": 4}],
}
# The last one is cut to a pack of its own, in which its prompt has but 32 tokens left.
LENGTHS = [*mixed_lengths(40, 384, seed=3), 1200]


def token_mean(losses: TokenLosses) -> torch.Tensor:
    packs = [torch.cat(samples) for packs in losses for samples in packs]
    return torch.stack([pack.mean() for pack in packs if len(pack)]).mean()


def sample_mean(losses: TokenLosses) -> torch.Tensor:
    samples = [sample for packs in losses for samples in packs for sample in samples]
    return torch.stack([sample.mean() for sample in samples if len(sample)]).mean()


def sum_by(world_size: int) -> Callable[[TokenLosses], torch.Tensor]:
    def reduce(losses: TokenLosses) -> torch.Tensor:
        return torch.cat([x for packs in losses for samples in packs for x in samples]).sum() / (world_size * len(losses))

    return reduce


def longalign(losses: TokenLosses) -> torch.Tensor:
    with_targets = [packs for packs in losses if any(len(sample) for samples in packs for sample in samples)]
    return torch.stack([sample_mean([packs]) for packs in with_targets]).mean()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_loss_equals_its_formula_in_one_process(ranks: Callable[[int], RankPool], tmp_path: Path, world_size: int) -> None:
    formulas = {
        "TokenMeanLoss": token_mean,
        "SampleMeanLoss": sample_mean,
        "SumLoss": sum_by(world_size),
        "LongAlignLoss": longalign,
    }
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, formula in formulas.items():
        # Sum's gradients are far above the bound: clipping is part of what is compared.
        loss = {"_component_": f"hbp_tune.components.{name}"}
        cfg = recipe_config(tmp_path, LENGTHS, GROUPS[world_size], loss=loss, clip_grad_norm=1.0)
        cfg.planner.tokens_per_step = 768
        cfg.planner.overlong = "truncate"
        runs[name] = ranks(world_size).run(run_recipe_job, cfg)[0]
        plan, dataset = plan_of(cfg, world_size)
        want = train_reference(cfg, plan, dataset, reduce=formula)
        assert len(runs[name]) == len(want) > 3
        for step, (left, right) in enumerate(zip(runs[name], want, strict=True)):
            for key in ("loss", "grad_norm"):
                assert left[key] == pytest.approx(right[key], rel=1e-5), f"{key} of {name} at step {step}"
    assert len(plan.truncated) == 1, "a sample that is cut is among them"
    assert plan.pack_micro_step.max() > 0, "the losses differ by accumulation too"
    assert len({tuple(round(step["loss"], 4) for step in steps) for steps in runs.values()}) == 4, "no loss stands in for another"
