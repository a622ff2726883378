"""Attention kernels on packs, forward and backward: one JSON line per case.

    python benchmarks/bench_attention.py                        # CUDA: 32/8 heads of 128 in bf16; CPU: small, fp32
    python benchmarks/bench_attention.py --pack-lens 16384 131072 --repeats 20

Counted is causal attention inside documents, half of ``sum(len ** 2)``, and 2.5 times the forward for the backward, whatever
a kernel really computes. ``forward_error`` and ``backward_error`` are the largest difference from SDPA in fp32 over the
largest value. Kernels of a pack run in turn, the first rounds are left out, times are medians.
"""

import argparse
from collections.abc import Callable
from functools import cache

import torch
from lines import say
from measuring import attention_flops, device, interleaved, machine, mixed_doc_lens
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hbp_tune.data.batches.batch import Spans
from hbp_tune.parallel.attention import (
    Attention,
    cudnn_attention,
    flash_attention,
    has_flash_attention,
    has_varlen_attention,
    sdpa_per_document,
    varlen_attention,
)
from hbp_tune.planning.plans.sharding import share_out

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
SHORT_LEN = 512


def packs(pack_len: int) -> dict[str, list[int]]:
    """One document, lengths as in Tulu 3 + LongCite, and many short ones."""
    return {
        "one document": [pack_len],
        "mixed": mixed_doc_lens(pack_len),
        "short": [min(SHORT_LEN, pack_len)] * max(1, pack_len // SHORT_LEN),
    }


def flex(doc_lens: list[int], on: torch.device) -> Attention:
    """Run torch's flex attention, compiled, with the documents as a block mask that is made once.

    KV heads are repeated first, as by torchtune: on an H200 (torch 2.11) compiling its own way took more than a minute.
    """
    doc_ids = torch.repeat_interleave(torch.arange(len(doc_lens)), torch.tensor(doc_lens)).to(on)

    def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (doc_ids[query] == doc_ids[key])

    @cache
    def mask() -> BlockMask:
        # Compiled, or it would make a dense mask first: 16 GiB for 128K tokens.
        return torch.compile(create_block_mask)(same_document, None, None, len(doc_ids), len(doc_ids), device=on.type)

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        heads_first = [x.transpose(0, 1)[None] for x in (q, *(y.repeat_interleave(repeats, dim=1) for y in (k, v)))]
        return compiled(*heads_first, block_mask=mask())[0].transpose(0, 1)

    return attend


def dense(doc_lens: list[int], on: torch.device) -> Attention:
    """One SDPA under a dense mask of documents, torchtune's way without flex attention."""
    doc_ids = torch.repeat_interleave(torch.arange(len(doc_lens)), torch.tensor(doc_lens)).to(on)
    mask = (doc_ids[:, None] == doc_ids[None]).tril()

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def kernels(doc_lens: list[int], on: torch.device) -> dict[str, Attention]:
    """Every kernel that can run here."""
    found: dict[str, Attention] = {"sdpa per document": sdpa_per_document}
    if on.type != "cuda":
        return found | {"dense mask": dense(doc_lens, on)}
    if has_varlen_attention():
        found["torch varlen"] = varlen_attention
        found["cudnn for long ones"] = cudnn_attention
    if has_flash_attention():
        found["flash-attn"] = flash_attention
    return found | {"flex, document mask": flex(doc_lens, on)}


def inputs(num_tokens: int, on: torch.device) -> list[Tensor]:
    generator = torch.Generator(on).manual_seed(0)
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
    shapes = [(num_tokens, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)]
    return [torch.randn(shape, generator=generator, device=on, dtype=dtype) for shape in shapes]


def run(attention: Attention, tensors: list[Tensor], spans: Spans) -> tuple[Tensor, ...]:
    """Give the output and the gradients of queries, keys and values."""
    *qkv, grad = tensors
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attention(*leaves, spans)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def reference(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """Attend in fp32; with fewer KV heads SDPA would hold all scores on CUDA, so these are repeated."""
    repeats = q.shape[1] // k.shape[1]
    return sdpa_per_document(q, k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1), spans)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).abs().max() / want.abs().max())


def cases(doc_lens: list[int], on: torch.device, *, repeats: int) -> list[dict[str, object]]:
    num_tokens = sum(doc_lens)
    spans = Spans.of_part(share_out(doc_lens, num_tokens, 1)[0]).map(lambda tensor: tensor.to(on))
    tensors = inputs(num_tokens, on)
    want = run(reference, [x.float() for x in tensors], spans)
    errors: dict[str, list[float]] = {}
    works: dict[str, Callable[[], object]] = {}
    lines: list[dict[str, object]] = []
    for name, attention in kernels(doc_lens, on).items():
        try:
            got = run(attention, tensors, spans)
        except (RuntimeError, NotImplementedError) as error:  # out of memory, or a kernel that this GPU lacks
            lines.append({"kernel": name, "failed": str(error).splitlines()[0]})
            continue
        errors[name] = [relative_error(*pair) for pair in zip(got, want, strict=True)]
        works[f"{name}, forward"] = lambda attention=attention: attention(*tensors[:3], spans)
        works[f"{name}, both"] = lambda attention=attention: run(attention, tensors, spans)
    seconds = interleaved(works, on, warmups=2, repeats=repeats)
    forward = attention_flops(doc_lens, NUM_HEADS, HEAD_DIM)
    for name, (output, *gradients) in errors.items():
        lines.append(
            {
                "kernel": name,
                "forward_ms": round(1e3 * seconds[f"{name}, forward"], 3),
                "both_ms": round(1e3 * seconds[f"{name}, both"], 3),
                "forward_tflops": round(forward / seconds[f"{name}, forward"] / 1e12, 4),
                "both_tflops": round(3.5 * forward / seconds[f"{name}, both"] / 1e12, 4),
                "forward_error": float(f"{output:.2g}"),
                "backward_error": float(f"{max(gradients):.2g}"),
            }
        )
    return lines


def main() -> None:
    on = device()
    lengths = [16384, 65536, 131072] if on.type == "cuda" else [1024, 2048]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack-lens", type=int, nargs="+", default=lengths)
    parser.add_argument("--repeats", type=int, default=10 if on.type == "cuda" else 5)
    arguments = parser.parse_args()
    say(machine())
    for pack_len in arguments.pack_lens:
        for name, doc_lens in packs(pack_len).items():
            for line in cases(doc_lens, on, repeats=arguments.repeats):
                say({"pack": name, "pack_len": sum(doc_lens), "documents": len(doc_lens), **line})


if __name__ == "__main__":
    main()
