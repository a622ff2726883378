"""What a run exports: Hugging Face transformers gives the trained model's logits, and a new run starts from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torchtune import training

from hbp_tune.demo.model import TinyLlama, build
from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed
from tests.helpers import SHAPE, mixed_lengths, plan_of, recipe_config
from tests.ranks import RankPool

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

TIED = TinyLlama(
    vocab_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=32,
    intermediate_dim=64,
    max_position_embeddings=2048,
    tied=True,
    rope_factor=32.0,
)
GROUPS = [{"name": "short", "pack_len": 256}, {"name": "long", "pack_len": 512, "cp_degree": 2, "ac_layers": 1}]


def train_and_keep_weights_job(cfg: DictConfig, weights_file: str) -> None:
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    recipe.train()
    state_dict = training.gather_cpu_state_dict(recipe._model, recipe.rank == 0, device=recipe._device)
    if recipe.rank == 0:
        torch.save(state_dict, weights_file)


def first_weights_job(cfg: DictConfig) -> dict[str, Any]:
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    return training.gather_cpu_state_dict(recipe._model, recipe.rank == 0, device=recipe._device)


@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["untied", "tied"])
def test_transformers_loads_the_export_and_gives_the_trained_logits(
    ranks: Callable[[int], RankPool], tmp_path: Path, shape: TinyLlama
) -> None:
    cfg = recipe_config(
        tmp_path, mixed_lengths(40, 512, seed=5), GROUPS, shape=shape, custom_sharded_layers=["tok_embeddings", "output"]
    )
    ranks(2).run(train_and_keep_weights_job, cfg, str(tmp_path / "weights.pt"))
    trained = build(shape)
    trained.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/epoch_0", dtype=torch.float32)
    tokens = torch.randint(0, shape.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, trained(tokens), atol=1e-4, rtol=0)


def test_training_moved_the_weights_and_a_new_run_starts_from_them(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, mixed_lengths(40, 512, seed=5), GROUPS)
    before = ranks(2).run(first_weights_job, cfg)[0]
    ranks(2).run(train_and_keep_weights_job, cfg, str(tmp_path / "weights.pt"))
    after = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(not torch.equal(before[name], after[name]) for name in after)
    cfg.checkpointer.checkpoint_dir = str(tmp_path / "out/epoch_0")
    cfg.checkpointer.checkpoint_files = ["model-00001-of-00001.safetensors"]
    cfg.checkpointer.output_dir = cfg.output_dir = str(tmp_path / "next")
    started = ranks(2).run(first_weights_job, cfg)[0]
    assert all(torch.equal(started[name], after[name]) for name in after)


def test_every_epoch_and_the_last_step_are_exported(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, mixed_lengths(20, 512, seed=5), GROUPS, epochs=3)
    cfg.max_steps = plan_of(cfg, world_size=2)[0].num_steps + 1
    ranks(2).run(train_and_keep_weights_job, cfg, str(tmp_path / "weights.pt"))
    assert sorted(path.name for path in (tmp_path / "out").glob("epoch_*")) == ["epoch_0", "epoch_1"]
