"""Training steps on mixed lengths beside torchtune's own packed training in the same run: one JSON line per case.

    python benchmarks/bench_step.py                                             # CUDA: Llama 3.1 8B's layers; CPU: tiny
    python benchmarks/bench_step.py --pack-len 32768 --lengths lengths.csv --column num_tokens --layers 16

One process with one rank of FSDP2. Both sides train the same packs, with random weights of the same shape, the same
AdamW, and as few recomputed layers as fit. torchtune's side is its stock decoder under its own packed mask (a flex attention
block mask on CUDA, a dense mask on a CPU) and its chunked loss, layer recomputation by the layer rather than all or nothing,
compiled and not, as ours. Cases take turns, each built anew every round; medians over rounds, warm-up steps left out.

``mfu`` is the model's operations, nothing counted twice for being run again, over the vendor's bf16 peak; ``of_matmul`` over
what a large matrix product reached in this run.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from lines import say
from measuring import (
    PackedStep,
    default_shape,
    device,
    join_world,
    machine,
    matmul_flops_per_s,
    mixed_doc_lens,
    random_decoder,
    step_flops,
    timed,
    with_layers,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchtune import training
from torchtune.modules.attention_utils import packed_block_causal_mask
from torchtune.modules.loss import CEWithChunkedOutputLoss

from hbp_tune.data import PackBatch
from hbp_tune.data.batches.made import random_batch
from hbp_tune.parallel import apply_fsdp, build_fsdp_mesh
from hbp_tune.planning import PackingGroup
from hbp_tune.planning.costs.hardware import gpu_of
from hbp_tune.planning.costs.memory import BF16_ADAMW, DecoderShape

# Of the GPU's memory: weights, gradients and optimizer states of the layers that are taken.
STATES_SHARE = 0.6


@dataclass(frozen=True, kw_only=True)
class Case:
    """Whose step it is, and its settings."""

    ours: bool
    compiled: bool = False
    ac_layers: int = 0


def most_layers(shape: DecoderShape, on: torch.device) -> int:
    """Give the layers whose states leave room for activations."""
    if on.type != "cuda":
        return shape.num_layers
    bytes_per_weight = 2 * BF16_ADAMW.weight + BF16_ADAMW.optimizer
    weights = STATES_SHARE * torch.cuda.get_device_properties(on).total_memory / bytes_per_weight
    return max(1, min(shape.num_layers, int((weights - 2 * shape.vocab_params) // shape.layer_params)))


def our_step(case: Case, shape: DecoderShape, batch: PackBatch, on: torch.device) -> Callable[[], None]:
    return PackedStep(shape, batch, on, max_seq_len=batch.num_tokens, compiled=case.compiled)


def stock_step(case: Case, shape: DecoderShape, batch: PackBatch, on: torch.device) -> Callable[[], None]:
    model = random_decoder(shape, on, batch.num_tokens)
    loss_fn = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_fn.num_output_chunks)
    if case.compiled:
        training.compile_model(model, verbose=False)
        training.compile_loss(loss_fn, verbose=False)
    for index in range(case.ac_layers):
        model.layers[index] = checkpoint_wrapper(model.layers[index])
    # A separate output would be gathered for each of the loss's chunks.
    apply_fsdp(model, model.layers, build_fsdp_mesh(on.type), compute_dtype=next(model.parameters()).dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    doc_lens = torch.tensor(batch.spans.query_lens, device=on)

    def step() -> None:
        mask = packed_block_causal_mask([doc_lens])  # made for every pack, as by torchtune's collation
        loss_fn(model(batch.tokens, mask=mask, input_pos=batch.input_pos), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    case: Case, shape: DecoderShape, doc_lens: list[int], on: torch.device, *, steps: int, warmups: int = 2
) -> tuple[float, float]:
    """Give the median seconds of a step and the peak GiB of tensors (0 on a CPU)."""
    group = PackingGroup(name="pack", pack_len=sum(doc_lens), ac_layers=case.ac_layers)
    batch = random_batch(doc_lens, group, shape.vocab_size).to(on)
    gc.collect()  # what the case before has left, a failed one too: FSDP's modules refer to each other
    if on.type == "cuda":
        torch.cuda.empty_cache()
    step = (our_step if case.ours else stock_step)(case, shape, batch, on)
    for _ in range(warmups):
        step()
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
    seconds = statistics.median(timed(step, on) for _ in range(steps))
    return seconds, torch.cuda.max_memory_allocated(on) / 2**30 if on.type == "cuda" else 0.0


def fewest_ac_layers(case: Case, shape: DecoderShape, doc_lens: list[int], on: torch.device) -> int:
    """Search the fewest recomputed layers that fit, by running out of memory; none first, which most often fits."""
    low, high, probed = 0, shape.num_layers, 0
    while on.type == "cuda" and low < high:
        try:
            measure(replace(case, ac_layers=probed), shape, doc_lens, on, steps=2, warmups=0)
            high = probed
        except torch.OutOfMemoryError:
            low = probed + 1
        probed = (low + high) // 2
    return low


def find_cases(shape: DecoderShape, doc_lens: list[int], on: torch.device, *, compiled: bool) -> dict[str, Case]:
    cases = {"hbp-tune": Case(ours=True), "torchtune": Case(ours=False)}
    found = {name: Case(ours=case.ours, ac_layers=fewest_ac_layers(case, shape, doc_lens, on)) for name, case in cases.items()}
    if compiled:
        found |= {f"{name}, compiled": replace(case, compiled=True) for name, case in found.items()}
    return found


def main() -> None:
    on = device()
    is_gpu = on.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack-len", type=int, default=16384 if is_gpu else 1024)
    parser.add_argument("--lengths", type=Path, help="a file of token lengths in place of synthetic ones")
    parser.add_argument("--column", help="of that file")
    parser.add_argument("--layers", type=int, help="of the decoder; by default as many as leave room for activations")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5 if is_gpu else 3, help="timed steps of a case in a round")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=is_gpu, help="both sides compiled too")
    arguments = parser.parse_args()
    join_world(on)
    shape = with_layers(default_shape(), arguments.layers or most_layers(default_shape(), on))
    doc_lens = mixed_doc_lens(arguments.pack_len, arguments.lengths, arguments.column)
    setting = {"layers": shape.num_layers, "embed_dim": shape.embed_dim, "pack_len": sum(doc_lens), "documents": len(doc_lens)}
    say(machine() | setting)
    cases = find_cases(shape, doc_lens, on, compiled=arguments.compile)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(arguments.rounds):
        for name, case in cases.items():
            rounds[name].append(measure(case, shape, doc_lens, on, steps=arguments.steps))
            print(f"{name}: {rounds[name][-1][0]:.4f} s", file=sys.stderr, flush=True)
    matmul, gpu = matmul_flops_per_s(on), gpu_of(machine()["device"])
    for name, case in cases.items():
        seconds = statistics.median(line[0] for line in rounds[name])
        flops_per_s = step_flops(shape, doc_lens) / seconds
        line = {
            "case": name,
            "attention": "varlen" if case.ours and is_gpu else "sdpa" if case.ours else "flex" if is_gpu else "dense mask",
            "compiled": case.compiled,
            "ac_layers": case.ac_layers,
            "step_s": round(seconds, 4),
            "tokens_per_s": round(sum(doc_lens) / seconds),
            "mfu": round(flops_per_s / gpu.flops_per_s, 4) if gpu else None,
            "of_matmul": round(flops_per_s / matmul, 4),
            "peak_gib": round(max(line[1] for line in rounds[name]), 2),
            "rounds_s": [round(line[0], 4) for line in rounds[name]],
        }
        say(line)
    say({"matmul_tflops": round(matmul / 1e12, 3)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
