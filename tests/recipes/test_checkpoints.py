"""What a run exports: Hugging Face transformers gives the trained model's logits, and a new run starts from it."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torchtune import config, training

from hbp_tune.config import build as build_component
from hbp_tune.demo.model import TinyLlama, build
from hbp_tune.models import qwen3
from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed, log
from tests.helpers import SHAPE, mixed_lengths, plan_of, recipe_config
from tests.models.tiny_qwen3 import HEAD_DIM, SMALL, write_checkpoint
from tests.ranks import RankError, RankPool

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

QWEN2 = {"vocab_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 64}


def write_qwen2(directory: Path, *, max_position_embeddings: int) -> None:
    """Write a random Qwen2 checkpoint whose config.json has the keys of Qwen2.5's own."""
    fields = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": QWEN2["embed_dim"],
        "initializer_range": 0.2,  # so that attention is far from even, and positions count
        "intermediate_size": QWEN2["intermediate_dim"],
        "max_position_embeddings": max_position_embeddings,
        "model_type": "qwen2",
        "num_attention_heads": QWEN2["num_heads"],
        "num_hidden_layers": QWEN2["num_layers"],
        "num_key_value_heads": QWEN2["num_kv_heads"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": QWEN2["vocab_size"],
    }
    torch.manual_seed(0)
    weights = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**fields)).state_dict()
    directory.mkdir()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(fields, indent=2))


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


def warnings_of_setup_job(cfg: DictConfig) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    HBPFullFinetuneRecipeDistributed(cfg).setup(cfg)
    log.removeHandler(handler)
    return [line for line in lines if "config.json" in line]  # torchtune warns by the same logger


OF_TORCHTUNE = {
    "_component_": "torchtune.training.FullModelHFCheckpointer",
    "checkpoint_files": ["model.safetensors"],
    "model_type": "LLAMA3",
}


@pytest.mark.parametrize(
    ("shape", "checkpointer"), [(SHAPE, {}), (TIED, {}), (SHAPE, OF_TORCHTUNE)], ids=["untied", "tied", "torchtune's"]
)
def test_transformers_loads_the_export_and_gives_the_trained_logits(
    ranks: Callable[[int], RankPool], tmp_path: Path, shape: TinyLlama, checkpointer: dict[str, Any]
) -> None:
    cfg = recipe_config(
        tmp_path, mixed_lengths(40, 512, seed=5), GROUPS, shape=shape, custom_sharded_layers=["tok_embeddings", "output"]
    )
    cfg.checkpointer |= checkpointer
    ranks(2).run(train_and_keep_weights_job, cfg, str(tmp_path / "weights.pt"))
    trained = build(shape)
    trained.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/epoch_0", dtype=torch.float32)
    assert (tmp_path / "out/epoch_0/config.json").read_bytes() == (tmp_path / "model/config.json").read_bytes()
    tokens = torch.randint(0, shape.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, trained(tokens), atol=1e-4, rtol=0)


def test_qwen3_is_trained_and_exported(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, mixed_lengths(40, 512, seed=5), GROUPS)
    write_checkpoint(tmp_path / "qwen3", tied=True)
    cfg.model = {"_component_": "hbp_tune.components.qwen3", **SMALL}
    cfg.model |= {"head_dim": HEAD_DIM, "max_seq_len": 512, "tie_word_embeddings": True}
    files = {"checkpoint_dir": str(tmp_path / "qwen3"), "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None}
    cfg.checkpointer = {"_component_": "hbp_tune.components.Qwen3Checkpointer", **files, "output_dir": cfg.output_dir}
    ranks(2).run(train_and_keep_weights_job, cfg, str(tmp_path / "weights.pt"))
    trained = qwen3(**SMALL, head_dim=HEAD_DIM, max_seq_len=512, tie_word_embeddings=True)
    trained.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/epoch_0", dtype=torch.float32)
    assert type(exported).__name__ == "Qwen3ForCausalLM"
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, trained(tokens), atol=2e-4, rtol=1e-4)


def test_training_moved_the_weights_and_a_new_run_starts_from_them(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, mixed_lengths(40, 512, seed=5), GROUPS)
    before = ranks(2).run(first_weights_job, cfg)[0]
    ranks(2).run(train_and_keep_weights_job, cfg, str(tmp_path / "weights.pt"))
    after = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(not torch.equal(before[name], after[name]) for name in after)
    cfg.checkpointer.checkpoint_dir = str(tmp_path / "out/epoch_0")
    cfg.checkpointer.output_dir = cfg.output_dir = str(tmp_path / "next")
    started = ranks(2).run(first_weights_job, cfg)[0]
    assert all(torch.equal(started[name], after[name]) for name in after)


def test_every_epoch_and_the_last_step_are_exported(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, mixed_lengths(20, 512, seed=5), GROUPS, epochs=3)
    cfg.max_steps = plan_of(cfg, world_size=2)[0].num_steps + 1
    ranks(2).run(train_and_keep_weights_job, cfg, str(tmp_path / "weights.pt"))
    assert sorted(path.name for path in (tmp_path / "out").glob("epoch_*")) == ["epoch_0", "epoch_1"]


def test_positions_beyond_the_checkpoints_own_are_trained_and_exported(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    write_qwen2(tmp_path / "model", max_position_embeddings=64)
    groups = [{"name": "short", "pack_len": 64}, {"name": "long", "pack_len": 256, "cp_degree": 2, "ac_layers": 1}]
    plain = {"_component_": "torchtune.models.qwen2.qwen2", "max_seq_len": 64, **QWEN2}
    model = {"_component_": "hbp_tune.components.with_yarn", "model": plain, "factor": 4.0}
    cfg = recipe_config(tmp_path, mixed_lengths(40, 256, seed=5), groups, model=model)
    ranks(2).run(train_and_keep_weights_job, cfg, str(tmp_path / "weights.pt"))

    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("model", "out/epoch_0"))
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert after == before | {"max_position_embeddings": 256, "rope_scaling": scaling}
    tokens = torch.randint(0, QWEN2["vocab_size"], (1, 256), generator=torch.Generator().manual_seed(0))
    logits = []
    for trained in (build_component("model", cfg.model), config.instantiate(cfg.model.model, max_seq_len=256)):
        trained.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        with torch.no_grad():
            logits.append(trained(tokens))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/epoch_0", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, logits[0], atol=1e-4, rtol=0)
    assert (logits[0] - logits[1])[:, 64:].abs().max() > 0.1, "YaRN makes no difference: the test is blind"


def test_what_the_run_will_change_in_the_config_is_said_once(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, [10, 100, 500], GROUPS)
    assert ranks(2).run(warnings_of_setup_job, cfg) == [[], []]
    cfg.model.max_seq_len = 4096
    lines = ranks(2).run(warnings_of_setup_job, cfg)
    assert (len(lines[0]), lines[1]) == (1, [])
    assert "max_position_embeddings is 2048, the model is built with 4096" in lines[0][0]


def test_another_rope_base_is_refused_before_data_are_read(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, [10, 100], GROUPS)
    cfg.model.rope_base = 10_000
    with pytest.raises(RankError, match=r"rank 1: ConfigError: .*rope_theta=500000.0 \(config.json\), the model .* with 10000.0"):
        ranks(2).run(first_weights_job, cfg)
    assert not (tmp_path / "stores").exists()


def test_weights_without_their_config_are_refused(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    cfg = recipe_config(tmp_path, [10, 100], GROUPS)
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(RankError, match=r"rank 0: ConfigError: \S+/model/config.json cannot be read .*No such file"):
        ranks(2).run(first_weights_job, cfg)
