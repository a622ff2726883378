"""Context parallelism by DTensor: each rank holds a shard of the sequence through the whole model, attention included."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hbp_tune.components.parallel.attention import Attention
from hbp_tune.components.planning.errors import ConfigError
from hbp_tune.components.planning.records import PackingGroup


class ContextParallel(Protocol):
    """A scheme that lets every token attend to its whole document although each rank holds a shard of the pack."""

    def check_heads(self, groups: Sequence[PackingGroup], *, num_heads: int, num_kv_heads: int) -> None:
        """Refuse groups whose CP degree the model's heads cannot serve, with a `ConfigError`."""
        ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mesh: DeviceMesh,
        attention: Attention,
        cu_seqlens: Tensor,
        doc_lens: Sequence[int],
    ) -> Tensor:
        """Attend; arguments as in `Attention`, but ``q``, ``k`` and ``v`` are this rank's rows, contiguous in rank order.

        Returns:
            This rank's rows of the output, ``[local_len, heads, head_dim]``.
        """
        ...


def _exchange(x: Tensor, mesh: DeviceMesh, *, split: int, join: int) -> Tensor:
    """Trade shards of dimension ``join`` for shards of dimension ``split``: one all-to-all, differentiable."""
    return DTensor.from_local(x, mesh, [Shard(join)], run_check=False).redistribute(mesh, [Shard(split)]).to_local()


class Ulysses:
    """DeepSpeed-Ulysses (Jacobs et al. 2023): sequence shards become head shards around attention, two all-to-alls a layer.

    Query, key and value heads that belong together travel in one message. Where there are fewer KV heads than ranks,
    KV heads are repeated to their least common multiple with the CP degree.
    """

    def check_heads(self, groups: Sequence[PackingGroup], *, num_heads: int, num_kv_heads: int) -> None:
        """Refuse a CP degree that does not divide the query heads.

        Raises:
            ConfigError: names the group, the heads and the degrees that work.
        """
        for group in groups:
            if num_heads % group.cp_degree:
                possible = ", ".join(str(d) for d in range(1, num_heads + 1) if num_heads % d == 0)
                raise ConfigError(
                    f"group {group.name!r}: cp_degree={group.cp_degree} does not divide the model's {num_heads} query heads, "
                    f"so Ulysses cannot split them; degrees that work: {possible}"
                )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mesh: DeviceMesh,
        attention: Attention,
        cu_seqlens: Tensor,
        doc_lens: Sequence[int],
    ) -> Tensor:
        """Attend over whole documents with this rank's share of the heads; see `ContextParallel`."""
        cp_degree = mesh.size()
        local_len, num_heads, head_dim = q.shape
        num_kv_heads = math.lcm(k.shape[1], cp_degree)
        if num_kv_heads != k.shape[1]:
            repeats = num_kv_heads // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        # Rank r serves the r-th block of query heads and the KV heads that they use: one block per rank, one message.
        blocks = [x.reshape(local_len, cp_degree, x.shape[1] // cp_degree, head_dim) for x in (q, k, v)]
        fused = _exchange(torch.cat(blocks, dim=2).flatten(1, 2), mesh, split=1, join=0)
        q, k, v = fused.split([num_heads // cp_degree, num_kv_heads // cp_degree, num_kv_heads // cp_degree], dim=1)
        return _exchange(attention(q, k, v, cu_seqlens, doc_lens).contiguous(), mesh, split=0, join=1)
