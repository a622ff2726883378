from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training

from hbp_tune.config import build, check_config
from hbp_tune.config.packaged import packaged_configs
from hbp_tune.models import adapt_decoder
from hbp_tune.parallel import describe_layouts, select_context_parallel
from hbp_tune.planning import PackingGroup, check_groups
from tests.helpers import launch_world_size

ROOT = Path(__file__).parents[2]
NAMES = list(packaged_configs())


def load(name: str) -> tuple[DictConfig, tuple[PackingGroup, ...]]:
    cfg = OmegaConf.load(packaged_configs()[name])
    return cfg, tuple(build("groups", group) for group in cfg.groups)


def test_what_is_shipped() -> None:
    sizes = {
        "llama3_1": ["8B", "70B"],
        "llama3_2": ["1B", "3B"],
        "llama3_3": ["70B"],
        "qwen2_5": ["0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"],
        "qwen3": ["0.6B", "1.7B", "4B", "8B", "14B", "32B"],
    }
    expected = {"demo/tiny_llama_cpu", "llama3_1/8B_hbp_full_single_device", "llama3_1/8B_hbp_full_4_nodes"}
    expected |= {f"{family}/{size}_hbp_full" for family in sizes for size in sizes[family]}
    expected |= {f"qwen2_5/{size}_instruct_128K_hbp_full" for size in sizes["qwen2_5"]}
    expected |= {f"qwen3/{size}_128K_hbp_full" for size in sizes["qwen3"]}
    assert set(NAMES) == expected


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_components(name: str) -> None:
    cfg, groups = load(name)
    OmegaConf.resolve(cfg)
    check_config(cfg)
    config.validate(cfg)
    largest = max(group.cp_degree for group in groups)
    for world_size in (largest, 2 * largest, 6 * largest, launch_world_size(name)):
        check_groups(groups, world_size)
    assert cfg.seed is not None
    assert Path(cfg.checkpointer.checkpoint_dir) not in (Path(cfg.output_dir), *Path(cfg.output_dir).parents)
    for key in ("planner", "curriculum", "loss"):
        build(key, cfg[key])


@pytest.mark.parametrize("name", NAMES)
def test_the_groups_suit_the_model(name: str) -> None:
    cfg, groups = load(name)
    with training.set_default_dtype(training.get_dtype(cfg.dtype, device=torch.device("cpu"))), torch.device("meta"):
        model = build("model", cfg.model)
    weights = {parameter.device.type for parameter in model.parameters()}
    parts = adapt_decoder(model)
    assert weights == {"meta"}
    scheme = cfg.get("context_parallel", "auto")
    scheme = select_context_parallel(scheme) if isinstance(scheme, str) else build("context_parallel", scheme)
    lines = describe_layouts(scheme, parts.heads, groups)
    assert len(lines) == sum(group.cp_degree > 1 for group in groups)
    assert max(group.ac_layers for group in groups) <= len(parts.layers)
    assert groups[-1].pack_len <= parts.max_seq_len


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_places_every_sample_once(name: str) -> None:
    cfg, groups = load(name)
    longest = groups[-1].pack_len
    rng = np.random.default_rng(0)
    short = rng.lognormal(np.log(longest / 200), 1.0, 3000).astype(np.int32)
    long = rng.integers(groups[0].pack_len, longest + 1, 40)
    lengths = np.clip(np.concatenate((short, long, [longest])), 2, longest).astype(np.int32)
    plan = build("planner", cfg.planner).plan(
        lengths,
        lengths - 1,
        groups,
        world_size=launch_world_size(name),
        seed=cfg.seed,
        curriculum=build("curriculum", cfg.curriculum),
    )
    assert sorted(plan.sample_ids) == list(range(len(lengths)))
    assert (plan.sum_per_pack(plan.lengths) <= np.array([group.pack_len for group in groups])[plan.pack_group]).all()
    assert set(plan.pack_group) == set(range(len(groups)))
    tokens = np.bincount(plan.pack_step, weights=plan.sum_per_pack(plan.lengths))
    assert np.median(tokens) <= 1.1 * cfg.planner.tokens_per_step
