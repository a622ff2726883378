"""A torchtune decoder with every parallel technique applied: the order of them stands here alone."""

from collections.abc import Sequence

import torch
from torch import nn

from hbp_tune.models.torchtune_decoder import DecoderParts, adapt_decoder, separate_units
from hbp_tune.parallel.activation_checkpoint import make_checkpointable
from hbp_tune.parallel.compile import compile_layers
from hbp_tune.parallel.loss_head import LossHead
from hbp_tune.parallel.mesh import build_fsdp_mesh
from hbp_tune.parallel.parallelize import apply_fsdp


def parallelize_decoder(
    model: nn.Module,
    *,
    loss_head: LossHead,
    device_type: str,
    compute_dtype: torch.dtype,
    compile_backend: str | None = None,
    separate: Sequence[str] = (),
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    shard_degree: int | None = None,
) -> DecoderParts:
    """Hook packs into a decoder, compile its layers and its head, make them recompute, and shard it, in this order, in place.

    Args:
        model: on any device, the meta device included.
        loss_head: turns the last hidden states into the loss.
        device_type: that ranks compute on.
        compute_dtype: of forward and backward.
        compile_backend: of torch.compile; None compiles nothing.
        separate: modules that are sharded by themselves, as torchtune's ``custom_sharded_layers``.
        reshard_after_forward: free gathered weights after the forward.
        cpu_offload: keep weights, gradients and optimizer state in host memory.
        shard_degree: ranks that share one copy of the weights; every rank where left out.
    """
    parts = adapt_decoder(model, loss_head=loss_head)
    if compile_backend:  # first, so that neither recomputation nor gathering of weights is part of a graph
        compile_layers(parts.layers, backend=compile_backend)
        loss_head.compile(compile_backend)
    make_checkpointable(parts.layers)  # before FSDP, which must gather weights around the recomputation too
    apply_fsdp(
        model,
        (*parts.layers, *separate_units(model, separate)),
        build_fsdp_mesh(device_type, shard_degree),
        compute_dtype=compute_dtype,
        reshard_after_forward=reshard_after_forward,
        cpu_offload=cpu_offload,
    )
    return parts
