"""The recipes in one process on one GPU, under NCCL; on the host, where there is none, under gloo.

Run on the host, on torch 2.13 and 2.11; not yet on a GPU: `pytest -m gpu tests/gpu`.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig

from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed
from tests.gpu.test_one_gpu import DEVICES
from tests.helpers import mixed_lengths, plan_of, recipe_config, train_reference
from tests.ranks import RankPool, join_gloo
from tests.recipes.test_hbp_profile_groups import profile_job


def join_nccl(init_method: str, rank: int, world_size: int, timeout: timedelta) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)


def recipe_job(cfg: DictConfig) -> tuple[str, list[dict[str, Any]]]:
    """Train; give why the kernel was chosen, and what was logged at each step."""
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    recipe.train()
    return recipe._why_attention, recipe._metric_logger.steps


def run_alone(job: Callable[[DictConfig], Any], cfg: DictConfig, directory: Path) -> Any:
    """Run a job in a process of its own, which may use the GPU."""
    is_cuda = cfg.device == "cuda"
    pool = RankPool(1, directory, join=join_nccl if is_cuda else join_gloo, start_method="spawn" if is_cuda else "fork")
    try:
        return pool.run(job, cfg)[0]
    finally:
        pool.close()


@DEVICES
def test_mixed_precision_follows_fp32(tmp_path: Path, device: str) -> None:
    """Weights in fp32, compute in bf16: the losses of torchtune's stock model in fp32 within 0.1%, and they fall."""
    is_cuda = device == "cuda"
    groups = [
        {"name": "short", "pack_len": 256, "ac_layers": 1},
        {"name": "long", "pack_len": 1024, "ac_layers": 2, "ac_mode": "selective"},
    ]
    cfg = recipe_config(
        tmp_path,
        mixed_lengths(80, 1024, seed=1),
        groups,
        device=device,
        compute_dtype="bf16",
        log_peak_memory_stats=True,
    )
    why_attention, steps = run_alone(recipe_job, cfg, tmp_path)
    assert ("varlen" if is_cuda else "sdpa") in why_attention.partition(",")[0]
    losses = [step["loss"] for step in steps]
    assert losses[-1] < losses[0]
    assert is_cuda == all(step.get("peak_memory_active", 0) > 0 for step in steps)
    assert losses == pytest.approx([step["loss"] for step in train_reference(cfg, *plan_of(cfg, world_size=1))], rel=1e-3)


@DEVICES
def test_groups_are_profiled(tmp_path: Path, device: str) -> None:
    """Peaks grow with the pack and shrink with recomputation, and the groups hold the longest sample."""
    (tmp_path / "lengths.csv").write_text("num_tokens\n" + "\n".join(map(str, mixed_lengths(80, 2000, seed=1))))
    settings = {"shortest": 1024, "repeats": 2}
    cfg = recipe_config(tmp_path, [1], [{"name": "all", "pack_len": 512}], device=device, compute_dtype="bf16", profile=settings)
    cfg.lengths = str(tmp_path / "lengths.csv")
    fitting, _ = run_alone(profile_job, cfg, tmp_path)
    assert [(group.pack_len, group.cp_degree) for group in fitting] == [(1024, 1), (2048, 1)]
    saved = json.loads((tmp_path / "out" / "profile.json").read_text())["measurements"]
    peaks = {(one["group"]["pack_len"], one["group"]["ac_layers"]): one["peak_gib"] for one in saved}
    assert peaks[1024, 3] < peaks[1024, 0] < peaks[2048, 0]
    assert peaks[1024, 3] < peaks[2048, 3] < peaks[2048, 0]
