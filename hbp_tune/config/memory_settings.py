"""The settings of a configuration that decide memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hbp_tune.planning.costs.memory import DecoderShape, MemoryModel, adamw_bytes
from hbp_tune.planning.plans.sharding import CpDegrees


def memory_model(
    cfg: Mapping[str, Any], shape: DecoderShape, world_size: int, layout: Callable[[int, Sequence[int], int], CpDegrees]
) -> MemoryModel:
    """Model a GPU's memory by the settings that training reads: ``optimizer``, ``dtype``, ``fsdp_...``.

    Args:
        cfg: of the run; an optimizer is taken to have AdamW's two states.
        shape: of the model.
        world_size: ranks of the run.
        layout: of packs, by the run's context parallelism.
    """
    is_8bit = "8bit" in str((cfg.get("optimizer") or {}).get("_component_"))
    return MemoryModel(
        shape,
        world_size=world_size,
        states=adamw_bytes(weight=4 if cfg.get("dtype") == "fp32" else 2, is_8bit=is_8bit),
        shard_degree=cfg.get("fsdp_shard_degree"),
        accumulation="sharded" if cfg.get("fsdp_sharded_accumulation", True) else "whole",
        layout=layout,
    )
