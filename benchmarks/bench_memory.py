"""Modelled memory of training steps of Llama 3.1 8B, as markdown; on a CUDA machine also measured peaks beside the model.

    python benchmarks/bench_memory.py > benchmarks/results/memory_model_202611.md
    python benchmarks/bench_memory.py --budget-gib 79.1 --world-size 8

The measurement (one GPU) takes the model's layers or fewer, and packs of 8K documents: memory does not depend on how long
they are, time does.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from measuring import PackedStep, device, join_world, machine

from hbp_tune.data.batches.made import random_batch
from hbp_tune.planning import PackingGroup
from hbp_tune.planning.costs.memory import (
    BF16_ADAMW,
    BF16_ADAMW_8BIT,
    FP32_ADAMW,
    GIB,
    LLAMA3_1_8B_DECODER,
    RESERVE_BYTES,
    DecoderShape,
    MemoryModel,
    StateBytes,
    layer_activations,
)

K = 1024
MODES = ("full", "selective", "offload")
PACK_LENS = (16 * K, 32 * K, 64 * K, 128 * K, 256 * K, 512 * K, 1024 * K)
CP_DEGREES = (1, 2, 4, 8, 16)
NUM_LAYERS = LLAMA3_1_8B_DECODER.num_layers
MEASURED_DOC_LEN = 8 * K
# What an H200 reports.
H200_GIB = 139.8
# HBP paper, 32 H100 80G: pack_len, cp_degree, recomputed layers, memory in GB; where these do not fit, no memory.
PAPER = (
    (16 * K, 1, 28, None),
    (32 * K, 2, 28, 77),
    (32 * K, 4, 23, 78),
    (32 * K, 8, 8, 78),
    (64 * K, 2, 32, "OOM"),
    (64 * K, 4, 28, 78),
    (64 * K, 8, 24, 79),
    (128 * K, 4, 32, "OOM"),
    (128 * K, 8, 29, 78),
    (128 * K, 16, 23, 79),
)


def group_of(pack_len: int, cp_degree: int = 1, ac_layers: int = 0, ac_mode: str = "full") -> PackingGroup:
    return PackingGroup(name="pack", pack_len=pack_len, cp_degree=cp_degree, ac_layers=ac_layers, ac_mode=ac_mode)


def table(header: str, rows: Iterator[str]) -> None:
    print(f"| {header} |")
    print("|" + "---|" * (header.count("|") + 1))
    for row in rows:
        print(f"| {row} |", flush=True)
    print()


HOW_EXACT = """\
`python benchmarks/bench_memory.py`. Every figure follows from shapes by `planning/costs/memory.py`; none is fitted. Thirteen
peaks measured on an H200 are within 3.7% of it (one_h200_202611.md), and CPU tests hold it (bytes that autograd saves: exact; the
peak that torch's MemTracker sees under FSDP2: within 0.5%). Layers are not compiled; compiled ones save less. What no tensor
accounts for is an allowance of {reserve:.0f} GiB. Every pack is one document. GiB are 2^30 bytes: an 80 GB H100 has 79.6, an
H200 {h200}.
"""


def fewest(model: MemoryModel, budget_gib: float) -> Iterator[str]:
    """Fewest recomputed layers by pack length and mode, and the peak with them."""
    for pack_len in PACK_LENS:
        for mode in MODES:
            cells = []
            for cp_degree in CP_DEGREES:
                group = group_of(pack_len, cp_degree, ac_mode=mode)
                if cp_degree > model.world_size:
                    continue
                ac_layers = model.fewest_ac_layers(group, budget_gib)
                if ac_layers is None:
                    last = replace(group, ac_layers=NUM_LAYERS - 1)
                    cells.append(f"- ({model.peak(last).gib:.0f})")
                else:
                    cells.append(f"{ac_layers} ({model.peak(replace(group, ac_layers=ac_layers)).gib:.0f})")
            yield " | ".join((f"{pack_len // K}K", mode, *cells))


def beside_the_paper(model: MemoryModel, budget_gib: float) -> Iterator[str]:
    for pack_len, cp_degree, ac_layers, memory in PAPER:
        group = group_of(pack_len, cp_degree, ac_layers)
        peak = model.peak(group).gib
        chosen = model.fewest_ac_layers(group, budget_gib)
        yield f"{pack_len // K}K | {cp_degree} | {ac_layers} | {memory or '-'} | {peak:.1f} | {chosen}"


def one_gpu() -> Iterator[str]:
    for pack_len in (128 * K, 256 * K):
        for states, name in ((BF16_ADAMW, "bf16"), (BF16_ADAMW_8BIT, "8-bit")):
            for mode in ("full", "offload"):
                peak = MemoryModel(LLAMA3_1_8B_DECODER, world_size=1, states=states).peak(
                    group_of(pack_len, ac_layers=NUM_LAYERS - 1, ac_mode=mode)
                )
                fits = "yes" if peak.gib <= H200_GIB else "no"
                yield f"{pack_len // K}K | {name} | {mode}, {NUM_LAYERS - 1} layers | {peak.gib:.1f} | {fits}"


def parts_of(model: MemoryModel, group: PackingGroup) -> Iterator[str]:
    peak = model.peak(group)
    for name, size in peak.parts.items():
        yield f"{name.replace('_', ' ')} | {size / GIB:.2f}"
    yield f"**{peak.name}** | **{peak.gib:.2f}**"


def report(world_size: int, budget_gib: float) -> None:
    print("# Memory of a training step of Llama 3.1 8B, modelled, not measured\n")
    print(HOW_EXACT.format(reserve=RESERVE_BYTES / GIB, h200=H200_GIB))
    model = MemoryModel(LLAMA3_1_8B_DECODER, world_size=world_size)
    print(f"## Fewest recomputed layers on {world_size} GPUs of {budget_gib} GiB\n")
    print("bf16 weights and AdamW states, Ulysses, one micro-step a step. In brackets the peak in GiB; - does not fit with all")
    print("layers recomputed. `offload` keeps the inputs of recomputed layers in host memory.\n")
    table(
        " | ".join(("pack", "ac_mode", *(f"cp {degree}" for degree in CP_DEGREES if degree <= world_size))),
        fewest(model, budget_gib),
    )
    print("## Beside the HBP paper's table (32 H100 80G)\n")
    table(
        "pack | cp | paper: layers | paper: GB | modelled with these, GiB | modelled fewest layers",
        beside_the_paper(model, budget_gib),
    )
    print(WHY_NOT_THE_PAPERS)
    print("## Steps of several micro-steps\n")
    print("Between micro-steps lie shards of the gradients, or whole ones on every rank where the network is so slow that")
    print("`fsdp_sharded_accumulation: False` pays. Peak of 16K packs, 28 layers recomputed:\n")
    table("weights and states | one micro-step, GiB | sharded, GiB | whole, GiB", accumulation(world_size))
    print("## One H200\n")
    table("pack | optimizer | recomputed | modelled, GiB | fits", one_gpu())
    print("## The parts, 128K over 8 ranks with 12 recomputed layers\n")
    table("part | GiB", parts_of(model, group_of(128 * K, 8, 12)))
    layer = layer_activations(LLAMA3_1_8B_DECODER, group_of(128 * K))
    print(f"A layer saves {layer.attention + layer.mlp:,.0f} bytes a token, recomputing {layer.recomputed:,.0f}.\n")


def accumulation(world_size: int) -> Iterator[str]:
    group = group_of(16 * K, ac_layers=28)
    settings: dict[str, StateBytes] = {"bf16": BF16_ADAMW, "fp32 weights, bf16 compute": FP32_ADAMW}
    for name, states in settings.items():
        peaks = [
            MemoryModel(LLAMA3_1_8B_DECODER, world_size=world_size, states=states, accumulation=kind).peak(group).gib
            for kind in ("none", "sharded", "whole")
        ]
        yield f"{name} | " + " | ".join(f"{peak:.1f}" for peak in peaks)


WHY_NOT_THE_PAPERS = """\
With the paper's settings the model needs a third of the paper's memory, and it recomputes far fewer layers. The paper does
not give its sharding, and its column is what an allocator held just under its limit. What its rows say of the slope: with
what a layer saves here (0.80 GiB per 4K tokens more than its input), the three counts of layers at 4K, 8K and 16K tokens a
rank fit together only if 3.2 to 3.5 GiB per 4K tokens come on top, about what whole logits in bf16 and fp32 take (2.9 GiB),
and some 56 GiB do not depend on tokens at all: whole weights and gradients on every rank rather than shards, say. Or, if
only shards are there, a layer would have to save three times as much as torchtune's. Neither could be checked. On an H200
this package's steps need what the model counts, within 4%: start from the modelled count.
"""


def measured_step(shape: DecoderShape, group: PackingGroup, make_optimizer: Callable[..., torch.optim.Optimizer]) -> float:
    """Peak GiB that the allocator gave out in a step whose optimizer states were there before it."""
    gc.collect()  # what the case before has left: FSDP's modules refer to each other
    torch.cuda.empty_cache()
    on = device()
    batch = random_batch([MEASURED_DOC_LEN] * (group.pack_len // MEASURED_DOC_LEN), group, shape.vocab_size).to(on)
    step = PackedStep(shape, batch, on, max_seq_len=MEASURED_DOC_LEN, make_optimizer=make_optimizer)
    for parameter in step.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.optimizer.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    step.backward()
    step.optimizer.step()
    return torch.cuda.max_memory_allocated() / GIB


def measurements() -> Iterator[str]:
    from torchao.optim import AdamW8bit

    fused = partial(torch.optim.AdamW, fused=True)
    total_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    cases = [
        (layers, pack_len, mode, ac_layers, "bf16")
        for layers, pack_lens in ((4, (16 * K, 128 * K)), (16, (16 * K, 64 * K)))
        for pack_len in pack_lens
        for mode, ac_layers in (("full", 0), ("full", layers - 1), ("selective", layers - 1), ("offload", layers))
    ]
    cases += [(NUM_LAYERS, 16 * K, "full", 12, "8-bit"), (NUM_LAYERS, 128 * K, "full", NUM_LAYERS, "8-bit")]
    cases += [(NUM_LAYERS, 256 * K, "offload", NUM_LAYERS, "8-bit")]
    for num_layers, pack_len, mode, ac_layers, states in cases:
        shape = replace(LLAMA3_1_8B_DECODER, num_layers=num_layers)
        group = group_of(pack_len, 1, ac_layers, mode)
        peak = MemoryModel(shape, world_size=1, states=BF16_ADAMW if states == "bf16" else BF16_ADAMW_8BIT).peak(group)
        modelled = peak.gib - RESERVE_BYTES / GIB  # the allocator does not know of it
        if modelled > 0.98 * total_gib:
            continue
        case = f"{num_layers} | {pack_len // K}K | {group.describe_ac()} | {states} | {modelled:.2f}"
        try:
            measured = measured_step(shape, group, fused if states == "bf16" else AdamW8bit)
        except torch.OutOfMemoryError:
            yield f"{case} | out of memory | -"
        else:
            yield f"{case} | {measured:.2f} | {modelled / measured - 1:+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=32, help="GPUs that share weights and states")
    parser.add_argument("--budget-gib", type=float, default=79.0, help="memory of one of them")
    parser.add_argument("--only-measured", action="store_true", help="leave the modelled tables out")
    arguments = parser.parse_args()
    if not arguments.only_measured:
        report(arguments.world_size, arguments.budget_gib)
    if torch.cuda.is_available():
        join_world(device())
        print(f"## Measured on one {machine()['device']}, the reserve left out\n")
        table("layers | pack | recomputed | optimizer | modelled, GiB | measured, GiB | error", measurements())
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
