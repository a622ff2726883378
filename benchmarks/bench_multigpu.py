"""What context parallelism costs on a node, and a training step with and without it; ends in one row to report.

    make bench-multigpu                                               # all GPUs of this machine, under 15 minutes
    torchrun --nproc_per_node 2 benchmarks/bench_multigpu.py          # also on a CPU, small, over gloo

Exchange: forward and backward of each scheme over a pack of one document around a kernel that computes nothing, so that only
moving and arranging is timed; bytes are what a rank receives. Steps: layers of Llama 3.1 8B's shape with random weights,
16K packs on single ranks, and 128K packs over as many ranks as there are, up to 8. Times are those of the slowest rank.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from lines import say
from measuring import PackedStep, default_shape, device, join_world, machine, step_flops, timed, with_layers
from torch import Tensor

from hbp_tune.data.batches.batch import Spans
from hbp_tune.data.batches.made import random_batch
from hbp_tune.parallel import (
    AllGatherKV,
    AutoContextParallel,
    Ulysses,
    build_cp_meshes,
)
from hbp_tune.parallel.context_parallel import ContextParallel
from hbp_tune.planning import AttentionHeads, CpDegrees, PackingGroup
from hbp_tune.planning.costs.exchange import moved_heads
from hbp_tune.planning.costs.memory import DecoderShape
from hbp_tune.planning.plans.sharding import share_of_rank

SCHEMES: dict[str, ContextParallel] = {"ulysses": Ulysses(), "all_gather": AllGatherKV(), "auto": AutoContextParallel()}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the packs are, and how many layers a step has."""

    short_len: int
    long_len: int
    num_layers: int
    repeats: int


GPU_SIZE = Size(short_len=16384, long_len=131072, num_layers=4, repeats=5)
CPU_SIZE = Size(short_len=256, long_len=512, num_layers=2, repeats=2)


class _NoAttention(torch.autograd.Function):
    """Stands in for the kernel: passes queries on, and gives keys and values gradients of zero."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.shapes = k, v
        return q.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.contiguous(), *(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in ctx.shapes)


def no_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    return _NoAttention.apply(q, k, v)


def slowest(work: Callable[[], Any], on: torch.device, repeats: int) -> float:
    """Seconds on the slowest rank, the median of several times after two that do not count."""
    seconds = []
    for _ in range(repeats + 2):
        dist.barrier()
        seconds.append(timed(work, on))
    times = torch.tensor(seconds[2:], device=on, dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return float(times.median())


def exchange(scheme: ContextParallel, cp_degree: int, shape: DecoderShape, size: Size, on: torch.device) -> dict[str, Any]:
    """Time what one layer moves, forward and backward."""
    heads = AttentionHeads(query=shape.num_heads, kv=shape.num_kv_heads)
    degrees = scheme.layout(heads, cp_degree, [size.long_len], size.long_len)
    mesh = build_cp_meshes(scheme.layouts(heads, cp_degree), on.type)[degrees]
    part, _ = share_of_rank([size.long_len], size.long_len, degrees, dist.get_rank() % cp_degree)
    spans = Spans.of_part(part).map(lambda tensor: tensor.to(on))
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
    counts = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    local_len = size.long_len // cp_degree
    q, k, v = (torch.randn(local_len, n, shape.head_dim, device=on, dtype=dtype).requires_grad_() for n in counts)

    def work() -> None:
        out = scheme(q, k, v, mesh=mesh, attention=no_attention, spans=spans)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    moved = 2 * moved_heads(heads, degrees, size.long_len, part.gathered_len) * shape.head_dim * dtype.itemsize
    seconds = slowest(work, on, size.repeats)
    return {
        "layout": f"{degrees.ulysses} x {degrees.gather}",
        "ms": round(1e3 * seconds, 3),
        "mib": round(moved / 2**20, 2),
        "gb_per_s": round(moved / seconds / 1e9, 2),
    }


def step(group: PackingGroup, shape: DecoderShape, size: Size, on: torch.device) -> dict[str, Any]:
    """Time a training step in which every CP group has one pack of one document."""
    degrees = CpDegrees(ulysses=group.cp_degree)
    cp_rank = dist.get_rank() % group.cp_degree
    batch = random_batch([group.pack_len], group, shape.vocab_size, degrees=degrees, cp_rank=cp_rank).to(on)
    work = PackedStep(shape, batch, on, max_seq_len=group.pack_len, degrees=[degrees])
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
    seconds = slowest(work, on, size.repeats)
    num_packs = dist.get_world_size() // group.cp_degree
    flops = num_packs * step_flops(shape, [group.pack_len]) / dist.get_world_size()
    return {
        "pack_len": group.pack_len,
        "cp": group.cp_degree,
        "step_s": round(seconds, 4),
        "tokens_per_s": round(num_packs * group.pack_len / seconds),
        "tflops_per_rank": round(flops / seconds / 1e12, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated(on) / 2**30, 1) if on.type == "cuda" else None,
    }


def row(exchanges: list[dict[str, Any]], steps: list[dict[str, Any]]) -> str:
    """Join everything to one line of a markdown table."""
    about = machine()
    versions = ", ".join(f"{name} {about[name]}" for name in about if name not in ("device", "gib"))
    moved = "; ".join(f"cp {x['cp']} {x['scheme']} {x['ms']} ms, {x['gb_per_s']} GB/s" for x in exchanges) or "one rank"
    speed = "; ".join(f"{x['pack_len']} cp {x['cp']}: {x['step_s']} s, {x['tokens_per_s']} tokens/s" for x in steps)
    return f"| {dist.get_world_size()} x {about['device']} | {versions} | {moved} | {speed} |"


def main() -> None:
    on = device()
    size = GPU_SIZE if on.type == "cuda" else CPU_SIZE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=size.num_layers)
    arguments = parser.parse_args()
    size = replace(size, num_layers=arguments.layers)
    join_world(on)
    say(machine() | {"ranks": dist.get_world_size()})
    shape = with_layers(default_shape(), size.num_layers)
    degrees = [degree for degree in (1, 2, 4, 8) if dist.get_world_size() % degree == 0]
    exchanges = []
    for cp_degree in degrees[1:]:
        for name, scheme in SCHEMES.items():
            exchanges.append({"scheme": name, "cp": cp_degree, **exchange(scheme, cp_degree, shape, size, on)})
            say(exchanges[-1])
    steps = []
    for pack_len, cp_degree in dict.fromkeys(((size.short_len, 1), (size.long_len, degrees[-1]))):
        group = PackingGroup(name="pack", pack_len=pack_len, cp_degree=cp_degree, ac_layers=size.num_layers)
        steps.append(step(group, shape, size, on))
        say(steps[-1])
    if dist.get_rank() == 0:
        print("\n| hardware | versions | exchange of one layer, forward and backward | steps |\n|---|---|---|---|")
        print(row(exchanges, steps))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
