"""One context-parallel mesh per CP degree, all made at start-up: changing the group costs nothing."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hbp_tune.components.planning.records import PackingGroup

# Meshes by CP degree; no mesh for degree 1, which needs no communication.
CpMeshes = dict[int, DeviceMesh | None]


def build_fsdp_mesh(device_type: str) -> DeviceMesh:
    """Build the mesh that shards weights: every rank, for the whole run."""
    return init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("fsdp",))


def build_cp_meshes(groups: Sequence[PackingGroup], device_type: str, *, timeout: timedelta | None = None) -> CpMeshes:
    """Build one mesh per distinct CP degree; ranks ``k * cp .. (k + 1) * cp - 1`` share a pack.

    Making a process group is collective, so every rank must call this with equal groups.

    Args:
        groups: their CP degrees divide the world size.
        device_type: ``cuda`` or ``cpu``.
        timeout: of the new process groups, which do not inherit the world's.
    """
    world_size = dist.get_world_size()
    meshes: CpMeshes = {1: None}
    for degree in sorted({group.cp_degree for group in groups} - {1}):
        world = dist.group.WORLD
        assert world is not None, "init_process_group comes first"
        # Subgroups of the whole world would be a second communicator for the same ranks.
        pg = world if degree == world_size else dist.new_subgroups(group_size=degree, timeout=timeout)[0]
        meshes[degree] = DeviceMesh.from_group(pg, device_type, mesh_dim_names=("cp",))
        # NCCL opens its connections at the first collective: pay for it here, not inside step 1.
        dist.all_reduce(torch.zeros(1, device=device_type), group=pg)
    return meshes
