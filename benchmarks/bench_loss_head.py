"""Peak memory and time of loss heads, forward and backward.

    python benchmarks/bench_loss_head.py [--tokens 4096 --embed-dim 256 --vocab-size 32768 --dtype fp32 --chunk-tokens 256]

Each case runs in its own process. On a CPU the peak is the process's largest resident size, less what it was when hidden
states, weight and labels were there (so torch itself does not count); on CUDA it is what torch allocated at most, less the
same. Times are CPU seconds on one thread (a shared machine's clock would tell of its other work), on CUDA seconds. Prints a
JSON line per case; `bound_mib` is the sum of what the case has to hold at its worst moment.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from lines import say
from torch import Tensor
from torchtune.modules.loss import CEWithChunkedOutputLoss

from hbp_tune.parallel import ForwardGradientHead, LigerHead, RecomputedHead
from hbp_tune.parallel.loss_head import LossHead, _chunk_sizes, _fitting_chunk_tokens

MIB = 2**20
NUM_OUTPUT_CHUNKS = 8  # the stock loss's default
REPEATS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight)[0].float(), labels[0])


def stock(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Do as torchtune's recipe: the decoder projects in chunks (`set_num_output_chunks`), the loss widens them one by one."""
    logits = [F.linear(chunk, weight) for chunk in hidden.chunk(NUM_OUTPUT_CHUNKS, dim=1)]
    loss: Tensor = CEWithChunkedOutputLoss(NUM_OUTPUT_CHUNKS)(logits, labels)
    return loss  # the recipe, too, drops the logits before the backward


def with_head(head: LossHead) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return head(hidden, weight, labels, torch.full(labels.shape, 1 / labels.numel(), device=labels.device))

    return loss


CASES: dict[str, Callable[[int | None], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "naive": lambda _: naive,
    "torchtune CEWithChunkedOutputLoss": lambda _: stock,
    "RecomputedHead": lambda chunk_tokens: with_head(RecomputedHead(chunk_tokens)),
    "ForwardGradientHead": lambda chunk_tokens: with_head(ForwardGradientHead(chunk_tokens)),
    "LigerHead": lambda _: with_head(LigerHead()),
}


def bound_mib(case: str, tokens: int, weight: Tensor, chunk_tokens: int | None) -> float | None:
    """Sum the tensors that must be alive at once: fp32 logits in units of all of them, gradients of weight and hidden states."""
    item = weight.element_size()
    vocab_size, embed_dim = weight.shape
    logits = tokens * vocab_size * 4
    narrow = 0 if item == 4 else logits // 2  # logits before they are widened
    gradients = weight.numel() * item + tokens * embed_dim * item
    chunk = logits * max(_chunk_sizes(tokens, chunk_tokens or _fitting_chunk_tokens(weight))) / tokens
    bounds = {
        # Backward of the log-softmax: its output, the gradient that comes in, the gradient that goes out.
        "naive": 3 * logits,
        # End of the forward: all logits and all log-softmaxes.
        "torchtune CEWithChunkedOutputLoss": 2 * logits if item == 4 else narrow + logits,
        # As naive for one chunk, and the sum of the weight's gradient before this chunk.
        "RecomputedHead": 3 * chunk + gradients,
        # One chunk, and the weight's gradient in fp32.
        "ForwardGradientHead": chunk + narrow * chunk / logits + weight.numel() * 4 + tokens * embed_dim * item,
    }
    return round(bounds[case] / MIB, 1) if case in bounds else None


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def run_case(case: str, args: argparse.Namespace) -> None:
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    torch.set_num_threads(1)
    loss_of = CASES[case](args.chunk_tokens)

    def make(tokens: int, embed_dim: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        hidden = torch.randn(1, tokens, embed_dim, device=device, dtype=dtype).requires_grad_()
        weight = torch.empty(vocab_size, embed_dim, device=device, dtype=dtype).normal_().div_(embed_dim**0.5).requires_grad_()
        return hidden, weight, torch.randint(0, vocab_size, (1, tokens), device=device)

    loss_of(*make(16, 32, 64)).backward()  # libraries and their threads start before anything is measured
    inputs = make(args.tokens, args.embed_dim, args.vocab_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_bytes(device)
    loss_of(*inputs).backward()
    peak_mib = (peak_bytes(device) - before) / MIB
    times = []
    for _ in range(REPEATS):
        inputs[0].grad = inputs[1].grad = None
        start = seconds(device)
        loss_of(*inputs).backward()
        times.append(seconds(device) - start)
    row = {"case": case, "peak_mib": round(peak_mib, 1), "bound_mib": bound_mib(case, args.tokens, inputs[1], args.chunk_tokens)}
    say(row | {"lowest_s": round(min(times), 3), "median_s": round(sorted(times)[REPEATS // 2], 3)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--embed-dim", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunk-tokens", type=int, help="of our heads; fitted to the weight where left out")
    parser.add_argument("--case", choices=CASES, help="one case in this process; all, each in its own, where left out")
    args = parser.parse_args()
    if args.case:
        run_case(args.case, args)
        return
    for case in CASES:
        if case != "LigerHead" or args.device == "cuda":
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--case", case], check=True)


if __name__ == "__main__":
    main()
