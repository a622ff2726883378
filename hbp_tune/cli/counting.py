"""A run's memory, counted from its configuration: no weights, no data."""

from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import training

from hbp_tune.components import (
    DecoderParts,
    MemoryModel,
    adapt_decoder,
    build,
    decoder_shape,
    memory_model,
    select_context_parallel,
    setting,
)


def count_memory(cfg: DictConfig, world_size: int) -> tuple[MemoryModel, DecoderParts]:
    """Model the memory of each rank, and give the parts of the decoder, which is built without weights.

    Args:
        cfg: of the run.
        world_size: ranks of the run.
    """
    with training.set_default_dtype(training.get_dtype(cfg.dtype, device=torch.device("cpu"))), torch.device("meta"):
        model: nn.Module = build("model", cfg.model)
    decoder = adapt_decoder(model)
    scheme: Any = setting(cfg, "context_parallel") or "auto"
    context_parallel = select_context_parallel(scheme) if isinstance(scheme, str) else build("context_parallel", scheme)
    layout = partial(context_parallel.layout, decoder.heads)
    return memory_model(cfg, decoder_shape(model), world_size, layout), decoder
