"""A run's memory, counted from its configuration: no weights, no data."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import training

from hbp_tune.components import (
    CpDegrees,
    PackingGroup,
    adapt_decoder,
    build,
    decoder_shape,
    memory_model,
    select_context_parallel,
    setting,
)


class MemoryCount:
    """Counts what a rank needs for packing groups.

    Args:
        cfg: of the run; its model is built without weights.
        world_size: ranks of the run.

    Attributes:
        num_layers: of the model.
        max_seq_len: positions that it encodes.
    """

    def __init__(self, cfg: DictConfig, world_size: int) -> None:
        with training.set_default_dtype(training.get_dtype(cfg.dtype, device=torch.device("cpu"))), torch.device("meta"):
            model: nn.Module = build("model", cfg.model)
        decoder = adapt_decoder(model)
        self.num_layers, self.max_seq_len, self._heads = len(decoder.layers), decoder.max_seq_len, decoder.heads
        scheme: Any = setting(cfg, "context_parallel") or "auto"
        self._scheme = select_context_parallel(scheme) if isinstance(scheme, str) else build("context_parallel", scheme)
        self._memory = memory_model(cfg, decoder_shape(model), world_size)

    def peak_gib(self, group: PackingGroup) -> float:
        """Count the fullest moment of a step."""
        return self._memory.peak(group, self._layout(group)).gib

    def fewest_ac_layers(self, group: PackingGroup, budget_gib: float) -> int | None:
        """Give the fewest recomputed layers that fit; None where the group does not fit with all of them."""
        return self._memory.fewest_ac_layers(group, budget_gib, self._layout(group))

    def _layout(self, group: PackingGroup) -> CpDegrees:
        layout: CpDegrees = self._scheme.layout(self._heads, group.cp_degree, [group.pack_len], group.pack_len)
        return layout
