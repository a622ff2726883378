"""Components for test configurations, and the plain reference that recipes are compared with."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config, training

from hbp_tune.config.packaged import packaged_configs
from hbp_tune.demo.model import TinyLlama, build, write_checkpoint
from hbp_tune.models import model_shape
from hbp_tune.planning import BalancePlanner, CostModel, EpochPlan, PackingGroup, cut_of
from hbp_tune.planning.plans.truncation import kept_tokens
from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed
from tests.parallel.packs import block_causal

# Small enough that twenty steps take seconds; 4 query and 2 KV heads.
SHAPE = TinyLlama(
    vocab_size=128, num_layers=3, num_heads=4, num_kv_heads=2, embed_dim=32, intermediate_dim=64, max_position_embeddings=2048
)


class MemoryLogger:
    """A metric logger that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def log_config(self, config: DictConfig) -> None:
        """Take no notice."""

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        self.steps.append({"step": step, **payload})

    def close(self) -> None:
        """Nothing to close."""


class RandomTokens:
    """A data set of random tokens: the first third of each sample is masked, as a prompt would be."""

    def __init__(self, lengths: list[int], vocab_size: int, seed: int) -> None:
        self.lengths, self.vocab_size, self.seed = list(lengths), vocab_size, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.lengths):
            raise IndexError(index)
        length = self.lengths[index]
        uniform = np.random.default_rng((self.seed, index)).random(length)
        tokens = 1 + ((self.vocab_size - 1) * uniform**3).astype(np.int64)  # some tokens are far more frequent: loss can fall
        labels = tokens.copy()
        labels[: length // 3] = -100
        return {"tokens": tokens.tolist(), "labels": labels.tolist()}


def random_tokens(tokenizer: Any, *, lengths: list[int], vocab_size: int = 128, seed: int = 0) -> RandomTokens:
    """Build `RandomTokens` from a configuration, the way torchtune's data sets are built."""
    return RandomTokens(lengths, vocab_size, seed)


def no_tokenizer() -> None:
    """Stand in for a tokenizer: random tokens need none."""


class OnOneRankPlanner(BalancePlanner):
    """Plans for the CP degrees in ``cp_degrees``, then moves each split pack whole to its first rank.

    The other ranks of the pack get an empty one: the same plan without context parallelism.
    """

    def __init__(self, cp_degrees: list[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._cp_degrees = list(cp_degrees)

    def plan(self, lengths: Any, num_targets: Any, groups: Any, *, world_size: int, **kwargs: Any) -> EpochPlan:
        split = [replace(group, cp_degree=degree) for group, degree in zip(groups, self._cp_degrees, strict=True)]
        plan = super().plan(lengths, num_targets, split, world_size=world_size, **kwargs)
        whole = np.repeat(np.arange(plan.num_packs), plan.cp_degrees)  # each split pack once per rank
        is_first = np.diff(whole, prepend=-1) > 0
        docs = np.where(is_first, np.diff(plan.pack_offsets)[whole], 0)
        rank = plan.pack_first_rank[whole] + np.arange(len(whole)) - np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
        return EpochPlan(
            groups=tuple(groups),
            world_size=world_size,
            sample_ids=plan.sample_ids,
            lengths=plan.lengths,
            pack_offsets=np.concatenate(([0], np.cumsum(docs))),
            pack_group=plan.pack_group[whole],
            pack_step=plan.pack_step[whole],
            pack_micro_step=plan.pack_micro_step[whole],
            pack_first_rank=rank.astype(np.int32),
            dropped=plan.dropped,
            truncated=plan.truncated,
        )


def mixed_lengths(num_samples: int, longest: int, seed: int) -> list[int]:
    """Draw mostly short lengths and some up to ``longest``, which itself is among them."""
    rng = np.random.default_rng(seed)
    short = rng.integers(2, longest // 8, num_samples)
    long = rng.integers(longest // 4, longest, max(1, num_samples // 8))
    return [int(length) for length in np.concatenate((short, long, [longest]))]


def recipe_config(directory: Path, lengths: list[int], groups: list[dict[str, Any]], **changes: Any) -> DictConfig:
    """Make a whole configuration around random tokens and a tiny Llama; ``changes`` replace top-level keys."""
    shape = changes.pop("shape", SHAPE)
    if not (directory / "model").exists():
        write_checkpoint(directory / "model", shape, seed=0)
    builder = "llama3_2.llama3_2" if shape.tied else "llama3_1.llama3_1"
    model = {
        "_component_": f"torchtune.models.{builder}",
        "vocab_size": shape.vocab_size,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "embed_dim": shape.embed_dim,
        "intermediate_dim": shape.intermediate_dim,
        "max_seq_len": shape.max_position_embeddings,
    }
    if shape.tied:
        model |= {"tie_word_embeddings": True, "scale_factor": int(shape.rope_factor)}
    values = {
        "output_dir": str(directory / "out"),
        "token_store_dir": str(directory / "stores"),
        "model": model,
        "tokenizer": {"_component_": "tests.helpers.no_tokenizer"},
        "dataset": {"_component_": "tests.helpers.random_tokens", "lengths": lengths},
        "groups": [{"_component_": "hbp_tune.components.PackingGroup", **group} for group in groups],
        "planner": {"_component_": "hbp_tune.components.BalancePlanner", "tokens_per_step": 2048},
        "checkpointer": {
            "_component_": "hbp_tune.components.HFCheckpointer",
            "checkpoint_dir": str(directory / "model"),
            "output_dir": str(directory / "out"),
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "metric_logger": {"_component_": "tests.helpers.MemoryLogger"},
        "epochs": 1,
        "seed": 0,
        "device": "cpu",
        "dtype": "fp32",
    }
    return OmegaConf.create(values | changes)


def run_recipe_job(cfg: DictConfig) -> list[dict[str, Any]]:
    """Train by a configuration inside a pool; rank 0 gives what was logged at each step."""
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    recipe.train()
    return recipe._metric_logger.steps if recipe.rank == 0 else []


def plan_of(cfg: DictConfig, world_size: int, epoch: int = 0) -> tuple[EpochPlan, RandomTokens]:
    """Plan the random tokens of a configuration as its recipe does, in this process."""
    dataset = random_tokens(None, **{k: v for k, v in cfg.dataset.items() if k != "_component_"})
    lengths = np.array(dataset.lengths, dtype=np.int32)
    longest = max(group.pack_len for group in cfg.groups)
    cut = cut_of(cfg.planner.get("overlong", "error"))
    num_targets = np.array(
        [sum(label != -100 for label in cut_sample(dataset[i], longest, cut)["labels"][1:]) for i in range(len(dataset))]
    )
    groups = [PackingGroup(**{k: v for k, v in group.items() if k != "_component_"}) for group in cfg.groups]
    planner = BalancePlanner(**{k: v for k, v in cfg.planner.items() if k != "_component_"})
    with torch.device("meta"):
        cost = CostModel(model_shape(config.instantiate(cfg.model)))
    plan = planner.plan(lengths, num_targets, groups, world_size=world_size, seed=cfg.seed, epoch=epoch, cost=cost)
    return plan, dataset


def cut_sample(sample: dict[str, Any], max_len: int, cut: str) -> dict[str, Any]:
    """Cut a sample as plans that truncate do."""
    if len(sample["labels"]) <= max_len:
        return sample
    kept = kept_tokens(np.array(sample["labels"]) != -100, max_len, cut)
    return {key: [values[i] for i in kept] for key, values in sample.items()}


TokenLosses = list[list[list[torch.Tensor]]]


def mean_over_targets(losses: TokenLosses) -> torch.Tensor:
    """Reduce a step's token losses, by micro-step, pack and sample, to their mean."""
    return torch.cat([sample for packs in losses for samples in packs for sample in samples]).mean()


def stock_weights(cfg: DictConfig) -> dict[str, torch.Tensor]:
    """Give the checkpoint's weights as torchtune's own checkpointer reads them."""
    checkpointer = training.FullModelHFCheckpointer(
        checkpoint_dir=cfg.checkpointer.checkpoint_dir,
        checkpoint_files=["model.safetensors"],
        output_dir=cfg.output_dir,
        model_type="LLAMA3",
    )
    return dict(checkpointer.load_checkpoint()[training.MODEL_KEY])


def train_reference(
    cfg: DictConfig,
    plan: EpochPlan,
    dataset: RandomTokens,
    *,
    shape: TinyLlama = SHAPE,
    reduce: Callable[[TokenLosses], torch.Tensor] = mean_over_targets,
) -> list[dict[str, float]]:
    """Train torchtune's stock model in one process: a dense block-causal mask for every pack, and a formula for the loss."""
    model = build(shape)
    model.load_state_dict(stock_weights(cfg))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optimizer.lr)
    steps = []
    for step in range(plan.num_steps):
        mine = plan.pack_step == step
        losses: TokenLosses = [[] for _ in range(plan.pack_micro_step[mine].max() + 1)]
        for index in np.flatnonzero(mine & (np.diff(plan.pack_offsets) > 0)):
            pack = plan.pack(int(index), int(plan.pack_first_rank[index]))
            placed = [(dataset[int(i)], int(length)) for i, length in zip(pack.sample_ids, pack.lengths, strict=True)]
            samples = [cut_sample(sample, length, plan.cut) for sample, length in placed]
            losses[plan.pack_micro_step[index]].append(_dense_losses(model, samples))
        loss = reduce(losses)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=float(cfg.get("clip_grad_norm") or "inf"))
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": loss.item(), "grad_norm": norm.item()})
    return steps


def _dense_losses(model: nn.Module, samples: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Give the token losses of each document in one pack, under a dense mask, shifting labels inside each document."""
    lens = [len(sample["tokens"]) for sample in samples]
    logits = model(
        torch.tensor([token for sample in samples for token in sample["tokens"]])[None],
        mask=block_causal(lens)[None],
        input_pos=torch.cat([torch.arange(n) for n in lens])[None],
    )[0]
    losses = []
    for sample, rows in zip(samples, logits.split(lens), strict=True):
        labels = torch.tensor([*sample["labels"][1:], -100])
        losses.append(F.cross_entropy(rows[labels != -100], labels[labels != -100], reduction="none"))
    return losses


def launch_world_size(name: str) -> int:
    """Read the number of devices from the comment that says how to launch."""
    text = packaged_configs()[name].read_text()
    launch = rf"#   tune run (?:--nnodes (\d+) )?--nproc_per_node (\d+) hbp_full_finetune_distributed --config {name}\n"
    nodes, devices = re.search(launch, text).groups()
    return int(nodes or 1) * int(devices)
