"""Activation checkpointing of the first layers, switched at every step by the group that is trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def make_checkpointable(layers: Sequence[nn.Module]) -> None:
    """Let each layer recompute its activations when `set_ac_layers` says so; call before FSDP.

    The layer's class is replaced by a subclass made on the fly: unlike a wrapper, that leaves parameter names as they are.
    """
    for layer in layers:
        cls = type(layer)
        layer.__class__ = type(f"Checkpointable{cls.__name__}", (_CheckpointedForward, cls), {})
        layer.recompute = False  # type: ignore[assignment]


def set_ac_layers(layers: Sequence[nn.Module], ac_layers: int) -> None:
    """Recompute the first ``ac_layers`` layers from now on.

    The first rather than the last: their activations would live longest (peak 18.0 against 20.3 MiB on a small model).
    """
    for index, layer in enumerate(layers):
        layer.recompute = index < ac_layers  # type: ignore[assignment]


class _CheckpointedForward(nn.Module):
    """Stands before the layer's class in its method resolution order."""

    recompute: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        return super().forward(*args, **kwargs)
