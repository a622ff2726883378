"""Activation checkpointing of the first layers, switched at every step by the group that is trained."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hbp_tune.errors import ConfigError
from hbp_tune.planning.plans.records import PackingGroup

# What `selective` keeps, by name: an operator that this torch lacks, or whose package is not installed, never comes along.
_ATTENTION_OPS = frozenset(
    [
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "aten::_cudnn_attention_forward",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
        "flash_attn_3::_flash_attn_forward",
    ]
)
# Only context parallelism communicates inside a layer: FSDP gathers weights before the layer's forward.
_COMMUNICATION_NAMESPACES = frozenset(["_c10d_functional", "_c10d_functional_autograd", "_dtensor"])


def make_checkpointable(layers: Sequence[nn.Module]) -> None:
    """Let each layer recompute its activations when `set_ac_layers` says so; call after `compile_layers`, before FSDP.

    The layer's class is replaced by a subclass made on the fly: unlike a wrapper, that leaves parameter names as they are.
    """
    for layer in layers:
        layer.__class__ = _checkpointable(cast(Any, type(layer)))  # mypy takes a module's hash for its class's
        layer.ac_mode = None  # type: ignore[assignment]


def set_ac_layers(layers: Sequence[nn.Module], ac_layers: int, ac_mode: str = "full") -> None:
    """Recompute the first ``ac_layers`` layers from now on.

    The first rather than the last: their activations would live longest (peak 18.0 against 20.3 MiB on a small model).

    Args:
        layers: after `make_checkpointable`.
        ac_layers: how many recompute.
        ac_mode: how they do so, see `PackingGroup`.
    """
    for index, layer in enumerate(layers):
        layer.ac_mode = ac_mode if index < ac_layers else None  # type: ignore[assignment]


def check_offload(groups: Sequence[PackingGroup], device_type: str) -> None:
    """Check that there is another memory to move layer inputs to.

    Raises:
        ConfigError: a group would move them from the host to the host.
    """
    for group in groups:
        if group.ac_mode == "offload" and group.ac_layers and device_type != "cuda":
            raise ConfigError(
                f"group {group.name!r}: ac_mode=offload needs device=cuda, device is {device_type}; use full or selective"
            )


# Guards of compiled code name the class: one per layer class, or every layer would be compiled by itself.
@functools.cache
def _checkpointable(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Checkpointable{cls.__name__}", (_CheckpointedForward, cls), {})


class _CheckpointedForward(nn.Module):
    """Stands before the layer's class in its method resolution order."""

    ac_mode: str | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.ac_mode is None or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        return _CHECKPOINTS[self.ac_mode](super().forward, *args, **kwargs)


# Nothing inside the layers is random (models with dropout are refused), so no random state has to be kept for the second run.
_full = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def _keep_attention(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    namespace = op.name().partition("::")[0]
    if namespace in _COMMUNICATION_NAMESPACES or op.name().partition(".")[0] in _ATTENTION_OPS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_selective = functools.partial(_full, context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_attention))


def _offload(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint as a whole, with the positional tensors, the layer's input, in host memory until the backward.

    Inside, the hooks of checkpointing stand above those of `save_on_cpu`, so that nothing else is moved. Copies go through
    page-locked memory on CUDA, on the stream that computes: 1 GiB, 128K tokens of a width of 4096 in bf16, takes some tens of
    milliseconds on PCIe, the layer at such lengths seconds.
    """
    with save_on_cpu(pin_memory=True):
        return _full(forward, *args, **kwargs)


_CHECKPOINTS: dict[str, Callable[..., Any]] = {"full": _full, "selective": _selective, "offload": _offload}
