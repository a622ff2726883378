"""Packs of random tensors, the plain attention they are compared with, and the batches that ranks hold of them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hbp_tune.data import PackBatch
from hbp_tune.data.batches.batch import Spans
from hbp_tune.planning import CpDegrees, PackingGroup
from hbp_tune.planning.plans.sharding import share_of_rank, share_out

VOCAB = 64


def spans_of(doc_lens: Sequence[int]) -> Spans:
    """Spans of a pack that one rank holds whole."""
    return Spans.of_part(share_out(doc_lens, sum(doc_lens), 1)[0])


def rank_view(doc_lens: Sequence[int], padded: int, degrees: CpDegrees, cp_rank: int) -> tuple[Tensor, Spans]:
    """The rows of a pack that a rank of the CP group holds, and what it attends to."""
    part, rows = share_of_rank(doc_lens, padded, degrees, cp_rank)
    return torch.from_numpy(rows), Spans.of_part(part)


def qkv(
    num_tokens: int, heads: int, kv_heads: int, *, head_dim: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, h, head_dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def pack_tensors(doc_lens: Sequence[int], padded: int, seed: int) -> dict[str, Tensor]:
    """Random tokens and weights of a whole pack; every third label does not count, nor does padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (padded,), generator=generator)
    labels = torch.roll(tokens, -1)
    labels[::3] = -100
    labels[torch.tensor(doc_lens, dtype=torch.long).cumsum(0) - 1] = -100
    labels[sum(doc_lens) :] = -100
    weights = torch.rand(padded, generator=generator) * (labels != -100)
    positions = torch.cat([*(torch.arange(n) for n in doc_lens), torch.zeros(padded - sum(doc_lens), dtype=torch.long)])
    return {"tokens": tokens, "labels": labels, "loss_weights": weights, "input_pos": positions}


def batch_of(
    whole: dict[str, Tensor], doc_lens: Sequence[int], group: PackingGroup, degrees: CpDegrees, cp_rank: int
) -> PackBatch:
    """The batch that a rank of the CP group holds of a pack, all of a step."""
    rows, spans = rank_view(doc_lens, len(whole["tokens"]), degrees, cp_rank)
    return PackBatch(
        **{name: tensor[rows][None] for name, tensor in whole.items()},
        spans=spans,
        degrees=degrees,
        group=group,
        num_tokens=sum(doc_lens),
        step=0,
        is_last_micro_step=True,
    )


def block_causal(doc_lens: Sequence[int]) -> Tensor:
    """Who may see whom, ``bool[tokens, tokens]``: the own document up to oneself."""
    doc_ids = torch.repeat_interleave(torch.arange(len(doc_lens)), torch.tensor(doc_lens))
    return (doc_ids[:, None] == doc_ids[None]) & torch.ones(len(doc_ids), len(doc_ids), dtype=torch.bool).tril()


def dense(q: Tensor, k: Tensor, v: Tensor, doc_lens: Sequence[int]) -> Tensor:
    """Plain attention under one dense mask."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=block_causal(doc_lens))
    return out.transpose(0, 1)
