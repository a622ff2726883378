"""Causal attention over the documents of a pack: kernels behind one signature, and which one to take."""

import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hbp_tune.data.batches.batch import Spans
from hbp_tune.errors import ConfigError

# Tokens of the shortest document that cuDNN gets by itself, and what it is rounded up to: cuDNN makes a plan for every new
# length, some 0.1 s for forward and backward.
_LONG_RUN, _CUDNN_MULTIPLE = 8192, 1024
# Rows of a dense mask that SDPA needs at a time where a run has more keys than queries.
_MASKED_QUERIES = 1024


class Attention(Protocol):
    """Causal attention that stays inside each run of queries and its keys."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        """Attend.

        Args:
            q: ``[queries, heads, head_dim]``.
            k: ``[keys, kv_heads, head_dim]``; ``kv_heads`` divides ``heads``.
            v: as ``k``.
            spans: the runs; a run's last query sees all of its keys.

        Returns:
            ``[queries, heads, head_dim]``.
        """
        ...


def sdpa_per_document(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """Attend run by run with torch's SDPA: linear memory, any device and dtype; the path on CPU.

    On CPU 6.5 times faster, forward and backward, than a dense mask over 10 documents in 2048 tokens.
    """
    runs = zip(q.split(spans.query_lens), k.split(spans.key_lens), v.split(spans.key_lens), strict=True)
    return torch.cat([output for q_run, k_run, v_run in runs for output in _attend_run(q_run, k_run, v_run)])


def _attend_run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    num_keys = len(k)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if q.shape[2] == num_keys:
        return [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)]
    # SDPA aligns causality at the top left, so a run that ends a longer document needs a mask of its own.
    outputs, seen = [], num_keys - q.shape[2]
    for rows in q.split(_MASKED_QUERIES, dim=2):
        seen += rows.shape[2]
        mask = torch.ones(rows.shape[2], seen, dtype=torch.bool, device=q.device).tril(seen - rows.shape[2])
        out = F.scaled_dot_product_attention(rows, k[:, :, :seen], v[:, :, :seen], attn_mask=mask, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return outputs


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """Attend over all runs in one call of torch's variable-length flash attention (CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal, aligned at the bottom right
    if _takes_gqa(varlen_attn):  # torch 2.11 has no such argument, and takes fewer KV heads without a word
        options["enable_gqa"] = True
    lens = max(spans.query_lens), max(spans.key_lens)
    return cast(Tensor, varlen_attn(q, k, v, spans.cu_seqlens_q, spans.cu_seqlens_k, *lens, **options))


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """Attend over each long document by cuDNN, and over all others in calls of `varlen_attention` (CUDA, bf16 or fp16).

    On an H200 cuDNN takes 0.6 of the flash kernel's time from 4K tokens on (torch 2.11); for less it takes as long.
    """
    return attend_by_length(q, k, v, spans, long=_cudnn_causal, others=varlen_attention, shortest=_LONG_RUN)


def attend_by_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    *,
    long: Callable[[Tensor, Tensor, Tensor], Tensor],
    others: Attention,
    shortest: int,
) -> Tensor:
    """Attend over long runs one by one, and over the neighbours between them together.

    Args:
        q: as in `Attention`.
        k: as in `Attention`.
        v: as in `Attention`.
        spans: as in `Attention`.
        long: causal attention over one document.
        others: the kernel for all other runs, those with more keys than queries included.
        shortest: tokens of the shortest run that is long.
    """
    is_long = [keys == queries >= shortest for queries, keys in zip(spans.query_lens, spans.key_lens, strict=True)]
    if not any(is_long):
        return others(q, k, v, spans)
    starts = [run for run in range(len(is_long)) if run == 0 or is_long[run] or is_long[run - 1]]
    parts = list(pairwise((*starts, len(is_long))))
    q_lens, k_lens = ([sum(lens[first:end]) for first, end in parts] for lens in (spans.query_lens, spans.key_lens))
    rows = zip(q.split(q_lens), k.split(k_lens), v.split(k_lens), strict=True)
    return torch.cat(
        [
            long(*qkv) if is_long[first] else others(*qkv, spans.of_runs(first, end))
            for (first, end), qkv in zip(parts, rows, strict=True)
        ]
    )


def _cudnn_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over one document; padded at its end, where causal queries never look."""
    num_tokens = len(q)
    padding = -num_tokens % _CUDNN_MULTIPLE
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)).transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)[:num_tokens]


def flash_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """Attend over all runs in one call of the flash-attn package (CUDA, bf16 or fp16)."""
    from flash_attn import flash_attn_varlen_func

    lens = max(spans.query_lens), max(spans.key_lens)
    return cast(Tensor, flash_attn_varlen_func(q, k, v, spans.cu_seqlens_q, spans.cu_seqlens_k, *lens, causal=True))


@cache
def _takes_gqa(function: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(function).parameters


def has_varlen_attention() -> bool:
    """Tell whether this torch has the variable-length kernel, which came with 2.10."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def has_flash_attention() -> bool:
    """Tell whether the flash-attn package is installed."""
    return importlib.util.find_spec("flash_attn") is not None


_KERNELS: dict[str, Attention] = {
    "cudnn": cudnn_attention,
    "varlen": varlen_attention,
    "flash": flash_attention,
    "sdpa": sdpa_per_document,
}


def select_attention(name: str, device: torch.device, compute_dtype: torch.dtype) -> tuple[Attention, str]:
    """Choose the attention kernel.

    Args:
        name: ``auto``, ``cudnn`` (cuDNN for long documents, ``varlen`` for the others), ``varlen`` (torch), ``flash`` (the
            flash-attn package) or ``sdpa`` (one SDPA per document).
        device: that the model runs on.
        compute_dtype: of queries, keys and values.

    Returns:
        The kernel, and a line that says which one it is and why.

    Raises:
        ConfigError: there is no such kernel, or it cannot run here.
    """
    if name not in ("auto", *_KERNELS):
        raise ConfigError(f"attention={name!r} is not a kernel; choose auto or one of {', '.join(_KERNELS)}")
    half = compute_dtype in (torch.bfloat16, torch.float16)
    here = f"{str(compute_dtype).removeprefix('torch.')} on {device.type}"
    if name in ("cudnn", "varlen", "flash") and not (device.type == "cuda" and half):
        raise ConfigError(f"attention={name!r} runs in bf16 on CUDA, not {here}; set attention to auto or sdpa")
    if name == "flash" and not has_flash_attention():
        raise ConfigError(
            "attention='flash' needs the flash-attn package: pip install 'hbp-tune[flash]', or set attention to auto"
        )
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        raise ConfigError("attention='cudnn' needs a torch with cuDNN; set attention to auto")
    if name in ("cudnn", "varlen") and not has_varlen_attention():
        raise ConfigError(f"attention={name!r} needs torch 2.10 or newer, this is {torch.__version__}; set attention to flash")
    if name != "auto":
        return _KERNELS[name], f"attention: {name}, as configured"
    if device.type != "cuda":
        return sdpa_per_document, f"attention: sdpa, one call a document ({here} has no variable-length kernel)"
    if not half:
        return sdpa_per_document, f"attention: sdpa, one call a document (variable-length kernels want bf16, this is {here})"
    if has_varlen_attention():
        return varlen_attention, f"attention: varlen, torch {torch.__version__}'s own flash kernel ({here})"
    if has_flash_attention():
        version = importlib.metadata.version("flash_attn")
        return flash_attention, f"attention: flash, flash-attn {version} (torch {torch.__version__} has no varlen kernel)"
    raise ConfigError(
        f"attention in {here} needs torch 2.10 or newer (this is {torch.__version__}) or the flash-attn package: "
        f"pip install 'hbp-tune[flash]'"
    )
