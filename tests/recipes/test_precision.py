"""Number formats of weights, computation and optimizer state, seen in the numbers of a run on two ranks."""

import ast
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.distributed.tensor import DTensor

import hbp_tune
from hbp_tune.config import check_config
from hbp_tune.demo.model import TinyLlama
from hbp_tune.errors import ConfigError
from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed
from tests.helpers import mixed_lengths, recipe_config
from tests.ranks import RankPool

# Large enough that a rank's half of the embeddings and of the feed-forward weights has 4096 elements: torchao keeps the
# state of smaller tensors in full.
SHAPE = TinyLlama(
    vocab_size=256, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64, intermediate_dim=128, max_position_embeddings=2048
)
GROUPS = [{"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 512, "cp_degree": 2, "ac_layers": 1}]
LENGTHS = mixed_lengths(60, 512, seed=7)
NUM_STEPS = 8
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-3}
ADAMW_8BIT = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}
SCHEDULE = {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 3}


@dataclass
class Run:
    """What a rank saw.

    Args:
        steps: what was logged, on rank 0.
        dtypes: of the weights.
        state_types: of the optimizer's moments on this rank, by name of the weight.
        scales: the norms' scales, 1 before training.
    """

    steps: list[dict[str, Any]]
    dtypes: set[torch.dtype]
    state_types: dict[str, set[str]]
    scales: Tensor

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]


def run_job(cfg: DictConfig, stance: str = "force_eager") -> Run:
    """Train; ``stance`` is torch.compile's, which torchao's optimizers use: compiling costs more than these steps."""
    inductor_config.compile_threads = 1  # else each rank starts processes to compile in, and waits for them
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    with warnings.catch_warnings(), torch.compiler.set_stance(cast(Any, stance)):
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler uses deprecated parts of torch
        recipe.setup(cfg)  # resuming steps the optimizer once, so that there is state to load into
        recipe.train()
    named = dict(recipe._model.named_parameters())
    return Run(
        steps=recipe._metric_logger.steps if recipe.rank == 0 else [],
        dtypes={parameter.dtype for parameter in named.values()},
        state_types={
            name: {_kind(value) for key, value in recipe._optimizer.state[parameter].items() if key != "step"}
            for name, parameter in named.items()
        },
        scales=torch.cat([cast(DTensor, p.data).full_tensor().float() for name, p in named.items() if name.endswith(".scale")]),
    )


def _kind(state: Any) -> str:
    local = state.to_local() if isinstance(state, DTensor) else state
    return str(local.codes.dtype) if hasattr(local, "codes") else str(local.dtype)


def make_config(directory: Path, **changes: Any) -> DictConfig:
    planner = {"_component_": "hbp_tune.components.BalancePlanner", "tokens_per_step": 512}
    values = {"planner": planner, "shape": SHAPE, "max_steps": NUM_STEPS, "optimizer": ADAMW}
    return recipe_config(directory, LENGTHS, GROUPS, **(values | changes))


@pytest.fixture(scope="module")
def train(ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Train by changed settings on two ranks, the same settings once only; give what rank 0 saw."""
    done: dict[str, Run] = {}

    def run(**changes: Any) -> Run:
        if (key := repr(changes)) not in done:
            done[key] = ranks(2).run(run_job, make_config(tmp_path_factory.mktemp("run"), **changes))[0]
        return done[key]

    return run


MASTER = {"dtype": "fp32", "compute_dtype": "bf16"}
HALF = {"dtype": "bf16"}


@pytest.mark.parametrize(
    ("settings", "weights", "tolerance"),
    [(MASTER, torch.float32, 5e-4), (HALF, torch.bfloat16, 1e-3)],  # 1.5e-4 and 3.9e-4 were seen
    ids=["fp32 weights, bf16 compute", "bf16"],
)
def test_losses_stay_near_those_of_single_precision(
    train: Callable[..., Run], settings: dict[str, str], weights: torch.dtype, tolerance: float
) -> None:
    single, run = train(), train(**settings)
    assert single.losses[-1] < single.losses[0] - 0.3, "there is something to learn"
    assert run.losses == pytest.approx(single.losses, rel=tolerance)
    assert run.losses != single.losses
    assert run.dtypes == {weights}
    assert set.union(*run.state_types.values()) == {str(weights)}


def test_small_updates_survive_in_fp32_weights_and_are_lost_in_bf16(train: Callable[..., Run]) -> None:
    single, master, half = train(), train(**MASTER), train(**HALF)
    # Each update of a scale is about 1e-3, the learning rate; bf16's nearest number to 1 is 2**-8 away, its half is 2e-3.
    assert torch.equal(half.scales, torch.ones_like(half.scales))
    moved = single.scales - 1
    assert moved.abs().mean() > 2e-3
    assert (master.scales - single.scales).norm() < 0.03 * moved.norm()


def test_8bit_state_trains_as_full_state_does(train: Callable[..., Run]) -> None:
    run = train(optimizer=ADAMW_8BIT)
    assert run.losses == pytest.approx(train().losses, rel=5e-4)  # 1.2e-4 was seen
    for name, kinds in run.state_types.items():
        is_large = name.startswith(("tok_embeddings", "output")) or ".mlp.w" in name
        assert kinds == {"torch.uint8" if is_large else "torch.float32"}, name


@pytest.mark.slow
def test_the_compiled_8bit_update_does_the_same(
    ranks: Callable[[int], RankPool], train: Callable[..., Run], tmp_path: Path
) -> None:
    cfg = make_config(tmp_path, optimizer=ADAMW_8BIT, max_steps=2)
    compiled = ranks(2).run(run_job, cfg, "default")[0]
    assert compiled.losses == pytest.approx(train(optimizer=ADAMW_8BIT).losses[:2], rel=1e-5)


def test_stochastic_rounding_of_sharded_weights_is_refused(tmp_path: Path) -> None:
    optimizer = {**ADAMW_8BIT, "bf16_stochastic_round": True}
    with pytest.raises(ConfigError, match=r"bf16_stochastic_round=True .* before 0.16; remove it, and set dtype: fp32 with"):
        check_config(make_config(tmp_path, optimizer=optimizer, **HALF))


def test_8bit_state_resumes_bit_for_bit(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    settings = {"optimizer": ADAMW_8BIT, "lr_scheduler": SCHEDULE, "save_every_n_steps": 4, "keep_last_n_checkpoints": 2}
    whole = ranks(2).run(run_job, make_config(tmp_path, **settings))[0]
    shutil.rmtree(tmp_path / "out/progress/step_8")
    resumed = ranks(2).run(run_job, make_config(tmp_path, **settings, resume_from_checkpoint=True))[0]

    def numbers(run: Run) -> list[tuple[float, ...]]:
        return [(step["step"], step["loss"], step["grad_norm"], step["lr"]) for step in run.steps]

    assert [step["step"] for step in resumed.steps] == [5, 6, 7, 8]
    assert numbers(resumed) == numbers(whole)[4:]
    assert torch.equal(resumed.scales, whole.scales)
    # torchao keeps the rate in a tensor that the schedule changes in place; what was logged must not change with it.
    assert [step["lr"] for step in whole.steps[:4]] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3], rel=1e-6)
    assert resumed.state_types == whole.state_types


def test_the_package_imports_no_torchao_by_itself() -> None:
    for path in Path(hbp_tune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            )
            assert not any(name.startswith("torchao") for name in names), path
