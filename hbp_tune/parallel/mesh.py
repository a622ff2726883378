"""Context-parallel meshes, all made at start-up: changing the group costs nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hbp_tune.errors import ConfigError
from hbp_tune.planning.plans.sharding import CpDegrees


@dataclass(frozen=True, slots=True, eq=False)
class CpMesh:
    """The axes of a CP group; None where an axis has one rank, which needs no communication.

    Args:
        ulysses: neighbours that divide the heads of a part of the pack.
        gather: ranks with the same heads of different parts.
    """

    ulysses: DeviceMesh | None
    gather: DeviceMesh | None


CpMeshes = dict[CpDegrees, CpMesh]


def build_fsdp_mesh(device_type: str, shard_degree: int | None = None) -> DeviceMesh:
    """Build the mesh that shards weights, for the whole run.

    Args:
        device_type: ``cuda`` or ``cpu``.
        shard_degree: neighbouring ranks that share one copy of the weights, such as those of a node (HSDP); every rank where left
            out.

    Raises:
        ConfigError: the degree does not divide the ranks.
    """
    world_size = dist.get_world_size()
    if shard_degree in (None, world_size):
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("fsdp",))
    assert shard_degree is not None
    if shard_degree < 1 or world_size % shard_degree:
        raise ConfigError(
            f"fsdp_shard_degree={shard_degree} must divide the {world_size} ranks; leave it out to shard over all of them"
        )
    return init_device_mesh(device_type, (world_size // shard_degree, shard_degree), mesh_dim_names=("replicate", "fsdp"))


def build_cp_meshes(layouts: Iterable[CpDegrees], device_type: str, *, timeout: timedelta | None = None) -> CpMeshes:
    """Build the meshes of every layout; ranks ``k * cp .. (k + 1) * cp - 1`` share a pack.

    Layouts share process groups of the same ranks. Making a process group is collective, so every rank must call this with
    equal layouts.

    Args:
        layouts: their CP degrees divide the world size.
        device_type: ``cuda`` or ``cpu``.
        timeout: of the new process groups, which do not inherit the world's.
    """
    axes: dict[tuple[int, int], DeviceMesh | None] = {}

    def axis(size: int, stride: int, name: str) -> DeviceMesh | None:
        if (size, stride) not in axes:
            axes[size, stride] = None if size == 1 else _build_axis(size, stride, device_type, name, timeout)
        return axes[size, stride]

    return {
        degrees: CpMesh(axis(degrees.ulysses, 1, "ulysses"), axis(degrees.gather, degrees.ulysses, "gather"))
        for degrees in sorted({*layouts, CpDegrees()}, key=lambda degrees: (degrees.cp_degree, degrees.ulysses))
    }


def _build_axis(size: int, stride: int, device_type: str, name: str, timeout: timedelta | None) -> DeviceMesh:
    """Make process groups of ``size`` ranks that are ``stride`` apart, and give this rank's."""
    world_size, world = dist.get_world_size(), dist.group.WORLD
    assert world is not None, "init_process_group comes first"
    pg: ProcessGroup | None = world
    if size < world_size:  # subgroups of the whole world would be a second communicator for the same ranks
        blocks = range(0, world_size, size * stride)
        ranks = [[block + first + i * stride for i in range(size)] for block in blocks for first in range(stride)]
        pg, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)
    # NCCL connects every pair of ranks at their first all-to-all: pay for it here, not inside step 1.
    dist.all_to_all_single(torch.empty(size, device=device_type), torch.zeros(size, device=device_type), group=pg)
    assert pg is not None, "every rank is in one of the blocks"
    return DeviceMesh.from_group(pg, device_type, mesh_dim_names=(name,))
