"""A run's memory, counted from its configuration: no weights, no data."""

from functools import partial

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import training

from hbp_tune.config import build, build_setting, memory_model
from hbp_tune.models import DecoderParts, adapt_decoder, decoder_shape
from hbp_tune.parallel import select_context_parallel
from hbp_tune.planning import MemoryModel


def count_memory(cfg: DictConfig, world_size: int) -> tuple[MemoryModel, DecoderParts]:
    """Model the memory of each rank, and give the parts of the decoder, which is built without weights.

    Args:
        cfg: of the run.
        world_size: ranks of the run.
    """
    with training.set_default_dtype(training.get_dtype(cfg.dtype, device=torch.device("cpu"))), torch.device("meta"):
        model: nn.Module = build("model", cfg.model)
    decoder = adapt_decoder(model)
    context_parallel = select_context_parallel(build_setting(cfg, "context_parallel", default="auto"))
    layout = partial(context_parallel.layout, decoder.heads)
    return memory_model(cfg, decoder_shape(model), world_size, layout), decoder
