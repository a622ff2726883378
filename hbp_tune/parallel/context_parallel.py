"""Context parallelism by DTensor: each rank holds a shard of the sequence through the whole model, attention included.

Schemes differ in how they divide attention over the ranks of a CP group (`CpDegrees`): by heads (Ulysses), by queries with
all-gathered keys and values, or by both. One function runs them all.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from hbp_tune.data.batches.batch import Spans
from hbp_tune.errors import ConfigError
from hbp_tune.parallel.attention import Attention
from hbp_tune.parallel.mesh import CpMesh
from hbp_tune.planning.costs.exchange import AttentionHeads, kept_heads, moved_heads
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.planning.plans.sharding import CpDegrees, share_out


class ContextParallel(Protocol):
    """A scheme that lets every token attend to its whole document although each rank holds a shard of the pack."""

    def layouts(self, heads: AttentionHeads, cp_degree: int) -> Sequence[CpDegrees]:
        """Give every layout that `layout` may choose for a CP degree; meshes are made for them at start-up.

        Raises:
            ConfigError: the scheme cannot serve this degree.
        """
        ...

    def layout(self, heads: AttentionHeads, cp_degree: int, doc_lens: Sequence[int], padded: int) -> CpDegrees:
        """Choose how the ranks of a pack divide attention; depends on nothing else, so that they all decide the same.

        Args:
            heads: of the model.
            cp_degree: ranks that share the pack.
            doc_lens: the documents' tokens, in pack order.
            padded: rows of the pack.
        """
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mesh: CpMesh, attention: Attention, spans: Spans) -> Tensor:
        """Attend with this rank's rows.

        Args:
            q: ``[local_len, heads, head_dim]``.
            k: ``[local_len, kv_heads, head_dim]``.
            v: as ``k``.
            mesh: of the batch's layout.
            attention: the kernel.
            spans: of the batch.

        Returns:
            This rank's rows of the output, ``[local_len, heads, head_dim]``.
        """
        ...


class _DividedAttention(ABC):
    """What all schemes run: heads are traded inside the Ulysses axis, keys and values gathered along the other."""

    @abstractmethod
    def layouts(self, heads: AttentionHeads, cp_degree: int) -> Sequence[CpDegrees]:
        """Give every layout that may be chosen; see `ContextParallel`."""

    def layout(self, heads: AttentionHeads, cp_degree: int, doc_lens: Sequence[int], padded: int) -> CpDegrees:
        """Choose the only layout, whatever the documents; see `ContextParallel`."""
        return self.layouts(heads, cp_degree)[0]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mesh: CpMesh, attention: Attention, spans: Spans) -> Tensor:
        """Attend; see `ContextParallel`."""
        num_heads, num_kv_heads = q.shape[1], k.shape[1]
        if mesh.ulysses is not None:
            q, k, v = _sequence_to_heads(q, k, v, mesh.ulysses)
        if mesh.gather is not None:
            k, v = _gather_keys(k, v, spans, mesh.gather)
        out = attention(q, k, v, spans)
        return out if mesh.ulysses is None else _heads_to_sequence(out, mesh.ulysses, num_heads, num_kv_heads)


class Ulysses(_DividedAttention):
    """DeepSpeed-Ulysses (Jacobs et al. 2023): sequence shards become head shards around attention, two all-to-alls a layer.

    Query, key and value heads that belong together travel in one message. Heads that do not divide by the CP degree are
    repeated (KV) and filled up (query), see `AttentionHeads.over`.
    """

    def layouts(self, heads: AttentionHeads, cp_degree: int) -> Sequence[CpDegrees]:
        """All ranks divide the heads; see `ContextParallel`."""
        return (CpDegrees(ulysses=cp_degree),)


class AllGatherKV(_DividedAttention):
    """Each rank attends with its own queries to the gathered keys and values (as Llama 3 was trained, Dubey et al. 2024).

    Rows are divided so that causal attention is even and short documents need no communication, see `share_out`.
    """

    def layouts(self, heads: AttentionHeads, cp_degree: int) -> Sequence[CpDegrees]:
        """All ranks divide the queries; see `ContextParallel`."""
        return (CpDegrees(gather=cp_degree),)


@dataclass(frozen=True)
class UlyssesAllGather(_DividedAttention):
    """Ulysses between neighbours times all-gathered keys and values across them (as in USP, Fang and Zhao 2024).

    Args:
        ulysses_degree: neighbours that divide the heads; CP degrees of at most this are Ulysses alone.

    Raises:
        ConfigError: ``ulysses_degree`` is below 1.
    """

    ulysses_degree: int

    def __post_init__(self) -> None:
        if not isinstance(self.ulysses_degree, int) or self.ulysses_degree < 1:
            raise ConfigError(f"ulysses_degree={self.ulysses_degree!r} must be a whole number of at least 1")

    def layouts(self, heads: AttentionHeads, cp_degree: int) -> Sequence[CpDegrees]:
        """Divide heads by ``ulysses_degree`` and queries by the rest; see `ContextParallel`.

        Raises:
            ConfigError: a larger CP degree is not a multiple of ``ulysses_degree``.
        """
        ulysses = min(self.ulysses_degree, cp_degree)
        if cp_degree % ulysses:
            raise ConfigError(
                f"cp_degree={cp_degree} is not a multiple of ulysses_degree={ulysses}; set one to a multiple of the other, or "
                f"context_parallel to auto"
            )
        return (CpDegrees(ulysses=ulysses, gather=cp_degree // ulysses),)


class AutoContextParallel(_DividedAttention):
    """Chooses for every pack the layout that moves fewest bytes and keeps hardly more for the backward than Ulysses would.

    For a pack that is one document the choice depends on heads and degree alone: Llama's 32/8 heads over 8 are plain
    Ulysses, Qwen2.5's 28/4 are Ulysses over 4 times gathering over 2. The more of a pack is short documents, which stay
    whole on a rank, the less is there to gather.
    """

    def layouts(self, heads: AttentionHeads, cp_degree: int) -> Sequence[CpDegrees]:
        """The best for a pack of one document, and gathering alone: so few that meshes stay cheap.

        Less to gather makes no other layout the best: what Ulysses moves stays the same.
        """
        divisors = [degree for degree in range(cp_degree, 0, -1) if cp_degree % degree == 0]
        possible = [CpDegrees(ulysses=degree, gather=cp_degree // degree) for degree in divisors]
        padded = 2 * cp_degree * cp_degree  # any length does: the runs of one document scale
        return tuple(dict.fromkeys((_cheapest(possible, heads, [padded], padded), CpDegrees(gather=cp_degree))))

    def layout(self, heads: AttentionHeads, cp_degree: int, doc_lens: Sequence[int], padded: int) -> CpDegrees:
        """Choose by heads, degree and documents; see `ContextParallel`."""
        return _cheapest(self.layouts(heads, cp_degree), heads, doc_lens, padded)


def _cheapest(layouts: Sequence[CpDegrees], heads: AttentionHeads, doc_lens: Sequence[int], padded: int) -> CpDegrees:
    """Choose the layout that moves least among those that keep hardly more than Ulysses would."""
    # A group's recomputed layers were chosen to fit. Queries, keys and values are a quarter of what a layer keeps, or less.
    allowed = 9 / 8 * kept_heads(heads, CpDegrees(ulysses=layouts[0].cp_degree), padded, padded)

    def price(degrees: CpDegrees) -> tuple[bool, float, int]:
        parts = share_out(doc_lens, padded, degrees.gather)
        kept = kept_heads(heads, degrees, padded, max(int(part.key_lens.sum()) for part in parts))
        # With equal volume the layout with more Ulysses: it copies no keys.
        return kept > allowed, moved_heads(heads, degrees, padded, parts[0].gathered_len), -degrees.ulysses

    return min(layouts, key=price)


_SCHEMES: dict[str, type[ContextParallel]] = {"auto": AutoContextParallel, "ulysses": Ulysses, "all_gather": AllGatherKV}


def select_context_parallel(scheme: str | ContextParallel) -> ContextParallel:
    """Give the scheme of a name, for settings in one word; a scheme itself as it is.

    Raises:
        ConfigError: there is no such scheme.
    """
    if not isinstance(scheme, str):
        return scheme
    if scheme not in _SCHEMES:
        raise ConfigError(f"context_parallel={scheme!r} is not a scheme; choose one of {', '.join(_SCHEMES)}, or a _component_")
    return _SCHEMES[scheme]()


def describe_layouts(scheme: ContextParallel, heads: AttentionHeads, groups: Sequence[PackingGroup]) -> list[str]:
    """Say in a line for every group that needs it how its ranks divide attention over a pack of one document."""
    lines = []
    for group in groups:
        if group.cp_degree == 1:
            continue
        degrees = scheme.layout(heads, group.cp_degree, [group.pack_len], group.pack_len)
        sent = heads.over(degrees.ulysses)
        parts = [f"Ulysses over {degrees.ulysses}"] if degrees.ulysses > 1 else []
        parts += [f"all-gathered KV over {degrees.gather}"] if degrees.gather > 1 else []
        line = f"context parallel: group {group.name!r}, {heads.query}/{heads.kv} heads: {' x '.join(parts)}"
        lines.append(line + (f", heads filled up to {sent.query}/{sent.kv}" if sent != heads else ""))
    return lines


def _exchange(x: Tensor, mesh: DeviceMesh, *, split: int, join: int) -> Tensor:
    """Trade shards of dimension ``join`` for shards of dimension ``split``: one all-to-all, differentiable."""
    return DTensor.from_local(x, mesh, [Shard(join)], run_check=False).redistribute(mesh, [Shard(split)]).to_local()


def _sequence_to_heads(q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Tensor, Tensor]:
    """Give all rows of this rank's part, with its share of the heads."""
    degree = mesh.size()
    local_len, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    sent = AttentionHeads(query=num_heads, kv=num_kv_heads).over(degree)
    if sent.kv != num_kv_heads:
        repeats = sent.kv // num_kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    if sent.query != num_heads:
        empty = (sent.query - num_heads) // num_kv_heads
        q = F.pad(q.unflatten(1, (num_kv_heads, -1)), (0, 0, 0, empty)).flatten(1, 2)
    # Rank r serves the r-th block of query heads and the KV heads that they use: one block per rank, one message.
    blocks = [x.reshape(local_len, degree, x.shape[1] // degree, head_dim) for x in (q, k, v)]
    fused = _exchange(torch.cat(blocks, dim=2).flatten(1, 2), mesh, split=1, join=0)
    q, k, v = fused.split([sent.query // degree, sent.kv // degree, sent.kv // degree], dim=1)
    return q, k, v


def _heads_to_sequence(out: Tensor, mesh: DeviceMesh, num_heads: int, num_kv_heads: int) -> Tensor:
    """Give this rank's rows with all heads, the empty ones left out."""
    out = _exchange(out.contiguous(), mesh, split=0, join=1)
    if out.shape[1] == num_heads:
        return out
    filled: Tensor = out.unflatten(1, (num_kv_heads, -1))
    return filled[:, :, : num_heads // num_kv_heads].flatten(1, 2)


def _gather_keys(k: Tensor, v: Tensor, spans: Spans, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """Give the keys and values of every run, run by run; no communication where all documents are whole."""
    if spans.key_rows is None:
        return k, v
    own = torch.cat((k, v), dim=1)
    shards = DTensor.from_local(own[: spans.gathered_len], mesh, [Shard(0)], run_check=False)
    # The ranks' gradients of a gathered key add up: without Partial each would keep its own share alone.
    gathered = shards.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial()])
    keys, values = torch.cat((gathered, own)).index_select(0, spans.key_rows).split(k.shape[1], dim=1)
    return keys, values
