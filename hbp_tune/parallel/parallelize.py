"""Makes a decoder parallel, one function per technique, and switches it to the group of each pack."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from hbp_tune.data.batches.batch import PackBatch
from hbp_tune.parallel.activation_checkpoint import set_ac_layers
from hbp_tune.parallel.attention import Attention
from hbp_tune.parallel.context_parallel import ContextParallel
from hbp_tune.parallel.mesh import CpMesh, CpMeshes


class PackContext:
    """What attention needs to know of the pack at hand; travels through the decoder in the place of a mask.

    A plain class on purpose: FSDP2 rebuilds tuples and dataclasses on their way and casts the tensors inside.
    Recomputation in the backward sees the context of its own forward, so no state is global.
    """

    def __init__(self, batch: PackBatch, *, mesh: CpMesh, attention: Attention, context_parallel: ContextParallel) -> None:
        self._spans = batch.spans
        self._is_shared = batch.degrees.cp_degree > 1
        self._mesh = mesh
        self._attention = attention
        self._context_parallel = context_parallel

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend inside documents; all arguments and the result are this rank's rows, ``[local_len, heads, head_dim]``."""
        if not self._is_shared:
            return self._attention(q, k, v, self._spans)
        return self._context_parallel(q, k, v, mesh=self._mesh, attention=self._attention, spans=self._spans)


class GroupSwitch:
    """Switches a decoder to the group of each pack: its CP mesh and its recomputed layers.

    Args:
        layers: the decoder's layers, after `make_checkpointable`.
        meshes: by layout, from `build_cp_meshes`.
        attention: the kernel.
        context_parallel: the scheme for groups with a CP degree over 1.
    """

    def __init__(
        self, layers: Sequence[nn.Module], meshes: CpMeshes, attention: Attention, context_parallel: ContextParallel
    ) -> None:
        self._layers = layers
        self._meshes = meshes
        self._attention = attention
        self._context_parallel = context_parallel

    def activate(self, batch: PackBatch) -> PackContext:
        """Set the recomputation for the batch's group and give the context that its forward takes as ``mask``."""
        set_ac_layers(self._layers, batch.group.ac_layers, batch.group.ac_mode)
        return PackContext(
            batch,
            mesh=self._meshes[batch.degrees],
            attention=self._attention,
            context_parallel=self._context_parallel,
        )


def apply_fsdp(
    model: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shard the weights (FSDP2): each unit by itself, what is left with the model.

    Args:
        model: on any device, the meta device included.
        units: modules whose weights are gathered together, normally the layers.
        mesh: of `build_fsdp_mesh`.
        compute_dtype: forward and backward run in it; gradients are reduced in fp32 where the weights are fp32.
        reshard_after_forward: free gathered weights after the forward and gather them again in the backward.
        cpu_offload: keep weights, gradients and optimizer state in host memory.
    """
    param_dtype = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != param_dtype else None,
        reduce_dtype=param_dtype if compute_dtype != param_dtype else None,
        cast_forward_inputs=False,  # the only float input of the model is loss_weights, which must stay fp32
    )
    offload_policy = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for module in (*units, model):
        fully_shard(
            module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward, offload_policy=offload_policy
        )
