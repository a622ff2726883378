"""The loss head: logits to a weighted sum of token losses without ever holding all logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hbp_tune.components.data.batch import IGNORE_INDEX

# fp32 logits of one chunk; 256 MiB is 512 tokens of a 128K vocabulary.
_CHUNK_BYTES = 2**28


def weighted_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
    """Sum ``loss_weights * cross_entropy(hidden @ weight.T, labels)`` over tokens, chunk by chunk.

    Each chunk's logits are made again in the backward, so that only one chunk's are alive at any time.

    Args:
        hidden: ``[1, local_len, embed_dim]``, the decoder's normalised output.
        weight: ``[vocab_size, embed_dim]``, the output projection.
        labels: ``int64[1, local_len]``, -100 where a token does not count.
        loss_weights: ``float32[1, local_len]``, 0 where a token does not count.

    Returns:
        A scalar in fp32; a shard without labels gives a zero that keeps the graph.
    """
    chunk_tokens = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    chunks = zip(*(x[0].split(chunk_tokens) for x in (hidden, labels, loss_weights)), strict=True)
    return torch.stack([checkpoint(_chunk_loss, h, weight, y, w, use_reentrant=False) for h, y, w in chunks]).sum()


def _chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return (F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none") * loss_weights).sum()
