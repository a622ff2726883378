"""What the benchmarks share: machine, timing, work in FLOPs, packs, a decoder, our training step."""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torchtune import training
from torchtune.models.llama3 import llama3

from hbp_tune.data import PackBatch, read_lengths
from hbp_tune.models import parallelize_decoder
from hbp_tune.parallel import ForwardGradientHead, GroupSwitch, Ulysses, build_cp_meshes, select_attention
from hbp_tune.planning import CpDegrees, ModelShape, synthetic_lengths
from hbp_tune.planning.costs.memory import LLAMA3_1_8B_DECODER, DecoderShape

TINY_DECODER = DecoderShape(
    num_layers=2, embed_dim=256, num_heads=8, num_kv_heads=2, head_dim=32, intermediate_dim=896, vocab_size=4096
)
CPU_NAME = "CPU"
FUSED_ADAMW = partial(torch.optim.AdamW, fused=True)


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))
    return torch.device("cuda", torch.cuda.current_device())


def default_shape() -> DecoderShape:
    """Llama 3.1 8B's where there is a GPU, else one that a CPU steps through in a second."""
    return LLAMA3_1_8B_DECODER if torch.cuda.is_available() else TINY_DECODER


def machine() -> dict[str, str]:
    """Name the hardware and the versions that decide its speed."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchtune")}
    if not torch.cuda.is_available():
        return {"device": f"{CPU_NAME} {platform.machine()}, {torch.get_num_threads()} threads", **versions}
    gpu = {"device": torch.cuda.get_device_name(), "gib": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}"}
    return {**gpu, **versions, "cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}


def matmul_flops_per_s(on: torch.device, repeats: int = 20) -> float:
    """Measure what a large matrix product reaches here: bf16 on CUDA, fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if on.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=on, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: left @ right, on) for _ in range(repeats + 3)][3:]
    return 2 * size**3 / statistics.median(seconds)


def timed(work: Callable[[], Any], on: torch.device) -> float:
    """Seconds of some work, all of it done on the device."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    start = time.perf_counter()
    work()
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter() - start


def interleaved(cases: dict[str, Callable[[], Any]], on: torch.device, *, warmups: int, repeats: int) -> dict[str, float]:
    """Median seconds of each case: all cases in turn, round after round, so that what changes meanwhile meets all of them."""
    rounds = [{name: timed(work, on) for name, work in cases.items()} for _ in range(warmups + repeats)]
    return {name: statistics.median(line[name] for line in rounds[warmups:]) for name in cases}


def attention_flops(doc_lens: Sequence[int], heads: int, head_dim: int) -> float:
    """Operations of causal attention's forward inside documents: half of ``sum(len ** 2)``, two products."""
    return 4 * heads * head_dim * sum(length**2 for length in doc_lens) / 2


def step_flops(shape: DecoderShape, doc_lens: Sequence[int]) -> float:
    """Operations of a model's forward and backward over documents, nothing counted twice for being run again."""
    model = ModelShape(
        num_layers=shape.num_layers,
        linear_params=shape.num_params - (0 if shape.tied else shape.vocab_params),
        attention_dim=shape.num_heads * shape.head_dim,
    )
    return model.token_flops * sum(doc_lens) + model.square_flops * sum(length**2 for length in doc_lens)


def mixed_doc_lens(pack_len: int, lengths_file: Path | None = None, column: str | None = None) -> list[int]:
    """Fill a pack with lengths as they come, longer ones left out, the last one cut to what is left.

    Raises:
        SystemExit: they do not fill one pack.
    """
    lengths: NDArray[np.int32]
    if lengths_file is None:
        lengths, _ = synthetic_lengths("tulu3_longcite", 20_000)
    else:
        lengths, _ = read_lengths(lengths_file, column)
    doc_lens: list[int] = []
    for length in lengths[lengths <= pack_len].tolist():
        doc_lens.append(min(length, pack_len - sum(doc_lens)))
        if sum(doc_lens) == pack_len:
            return doc_lens
    raise SystemExit(f"the lengths up to {pack_len} tokens add up to {sum(doc_lens)}, which does not fill one pack")


def random_decoder(shape: DecoderShape, on: torch.device, max_seq_len: int) -> nn.Module:
    """Build torchtune's Llama 3 with random weights: bf16 on CUDA, fp32 on a CPU."""
    with training.set_default_dtype(torch.bfloat16 if on.type == "cuda" else torch.float32), on:
        return llama3(
            vocab_size=shape.vocab_size,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            embed_dim=shape.embed_dim,
            intermediate_dim=shape.intermediate_dim,
            max_seq_len=max_seq_len,
        )


class PackedStep:
    """Our training step on one pack, as the recipe has it: FSDP2, the loss head, the group's mesh and recomputation.

    Args:
        shape: of a decoder with random weights.
        batch: the pack, on its device.
        on: this rank's device.
        max_seq_len: positions that the decoder has.
        compiled: its layers by torch.compile.
        degrees: layouts of context parallelism that the pack needs a mesh for.
        make_optimizer: of the parameters.
    """

    def __init__(
        self,
        shape: DecoderShape,
        batch: PackBatch,
        on: torch.device,
        *,
        max_seq_len: int,
        compiled: bool = False,
        degrees: Sequence[CpDegrees] = (),
        make_optimizer: Callable[..., torch.optim.Optimizer] = FUSED_ADAMW,
    ) -> None:
        self.model = random_decoder(shape, on, max_seq_len)
        dtype = next(self.model.parameters()).dtype
        layers = parallelize_decoder(
            self.model,
            loss_head=ForwardGradientHead(),
            device_type=on.type,
            compute_dtype=dtype,
            compile_backend="inductor" if compiled else None,
            separate=("tok_embeddings", "output"),
        ).layers
        self.optimizer = make_optimizer(self.model.parameters(), lr=1e-5)
        attention, _ = select_attention("auto", on, dtype)
        self._switch = GroupSwitch(layers, build_cp_meshes(degrees, on.type), attention, Ulysses())
        self._batch = batch

    def backward(self) -> None:
        """Run forward and backward."""
        batch, context = self._batch, self._switch.activate(self._batch)
        arguments = {"input_pos": batch.input_pos, "labels": batch.labels, "loss_weights": batch.loss_weights}
        self.model(batch.tokens, mask=context, **arguments).backward()

    def __call__(self) -> None:
        """Run a whole step."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def with_layers(shape: DecoderShape, num_layers: int | None) -> DecoderShape:
    """Give the shape with another number of layers, where one is asked for."""
    return shape if num_layers is None else replace(shape, num_layers=num_layers)


def join_world(on: torch.device) -> None:
    """Join the ranks that torchrun started, or be the only one."""
    backend = "nccl" if on.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
