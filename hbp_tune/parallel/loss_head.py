"""Loss heads: hidden states to a weighted sum of token losses without ever holding all logits."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hbp_tune.data.tokenizing.conversation import IGNORE_INDEX
from hbp_tune.errors import ConfigError


class LossHead(Protocol):
    """Gives ``sum(loss_weights * cross_entropy(hidden @ weight.T, labels))`` and its gradients."""

    def check(self, device: torch.device, document_weights: NDArray[np.float64], pack_of_sample: NDArray[np.int64]) -> None:
        """Refuse a device, or weights of an epoch's targets, that the head cannot serve, with a `ConfigError`.

        Args:
            device: of the run.
            document_weights: ``float64[placed]``, what each target of a placed sample weighs.
            pack_of_sample: ``int64[placed]``, ascending.
        """
        ...

    def compile(self, backend: str | Callable[..., Any]) -> None:
        """Compile what it computes, where the run compiles; called once, before the first step.

        Args:
            backend: of `torch.compile`.
        """
        ...

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
        """Give the weighted sum of this shard's token losses.

        Args:
            hidden: ``[1, local_len, embed_dim]``, the decoder's normalised output.
            weight: ``[vocab_size, embed_dim]``, the output projection, in the dtype of ``hidden``.
            labels: ``int64[1, local_len]``, -100 where a token does not count.
            loss_weights: ``float32[1, local_len]``, constants; 0 where a token does not count.

        Returns:
            A scalar, summed in fp32 (in fp64 from fp64); a shard without labels gives a zero that keeps the graph.
        """
        ...


class _ChunkedHead:
    """What the heads share that are plain torch: chunks of tokens, any device, any weights.

    Raises:
        ConfigError: ``chunk_tokens`` is below 1.
    """

    def __init__(self, chunk_tokens: int | None = None) -> None:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ConfigError(f"loss_head.chunk_tokens={chunk_tokens} must be at least 1; leave it out to fit it to the model")
        self._chunk_tokens = chunk_tokens

    def check(self, device: torch.device, document_weights: NDArray[np.float64], pack_of_sample: NDArray[np.int64]) -> None:
        """Serve every device and all weights."""

    def compile(self, backend: str | Callable[..., Any]) -> None:
        """Stay as it is."""

    def _chunk_sizes(self, num_tokens: int, weight: Tensor) -> list[int]:
        return _chunk_sizes(num_tokens, self._chunk_tokens or _fitting_chunk_tokens(weight))


class ForwardGradientHead(_ChunkedHead):
    """Computes the gradients of each chunk of tokens in the forward, while its logits are there; the default.

    Logits are made once and one chunk's are alive at a time. The gradient of the weight is summed over chunks in fp32.

    Args:
        chunk_tokens: most tokens of a chunk; fitted to the weight's shape where left out.
    """

    _gradients: "_Gradients"

    def __init__(self, chunk_tokens: int | None = None) -> None:
        super().__init__(chunk_tokens)
        self._gradients = _gradients_in_place

    def compile(self, backend: str | Callable[..., Any]) -> None:
        """Fuse what stands between the matrix products: on an H200 a sixth of the head's time, and no wide logits."""
        self._gradients = torch.compile(_fused_gradients, backend=backend, dynamic=True)

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
        """Give the weighted sum of token losses; see `LossHead`. It can be differentiated once."""
        rows = [x.squeeze(0) for x in (hidden, labels, loss_weights)]
        sizes = self._chunk_sizes(len(rows[0]), weight)
        apply: Any = _ForwardGradient.apply  # torch leaves it untyped
        loss: Tensor = apply(rows[0], weight, *rows[1:], sizes, self._gradients, torch.is_grad_enabled())
        return loss


class RecomputedHead(_ChunkedHead):
    """Makes each chunk's logits again in the backward: plain autograd, for one more matrix product.

    Args:
        chunk_tokens: most tokens of a chunk; fitted to the weight's shape where left out.
    """

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
        """Give the weighted sum of token losses; see `LossHead`."""
        sizes = self._chunk_sizes(hidden.shape[1], weight)
        chunks = zip(*(x.squeeze(0).split(sizes) for x in (hidden, labels, loss_weights)), strict=True)
        losses = [
            checkpoint(_chunk_loss, h, weight, y, w, use_reentrant=False, preserve_rng_state=False)  # nothing is random
            for h, y, w in chunks
        ]
        return torch.stack(losses).sum()


class TokenLossHead(_ChunkedHead):
    """Gives the loss of every token where other heads give the sum: for validation, without gradients.

    Args:
        chunk_tokens: most tokens of a chunk; fitted to the weight's shape where left out.
    """

    @torch.no_grad()
    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
        """Give weighted token losses, ``float32[1, local_len]`` (float64 from fp64); arguments as in `LossHead`."""
        sizes = self._chunk_sizes(hidden.shape[1], weight)
        chunks = zip(*(x.squeeze(0).split(sizes) for x in (hidden, labels, loss_weights)), strict=True)
        return torch.cat([_token_losses(h, weight, y, w) for h, y, w in chunks])[None]


class LigerHead:
    """Liger Kernel's fused linear cross entropy (Hsu et al. 2024): Triton kernels, for CUDA only.

    It knows one weight for all targets of a call, so the loss must weigh the targets of a pack alike, as `AveTokenLoss` does.

    Raises:
        ConfigError: liger-kernel cannot be imported.
    """

    def __init__(self) -> None:
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except ImportError as error:
            raise ConfigError(
                f"loss_head LigerHead needs liger-kernel ({error}); pip install 'hbp-tune[liger]', or leave loss_head out"
            ) from error
        self._fused = liger_fused_linear_cross_entropy

    def compile(self, backend: str | Callable[..., Any]) -> None:
        """Stay as it is: its kernels are compiled."""

    def check(self, device: torch.device, document_weights: NDArray[np.float64], pack_of_sample: NDArray[np.int64]) -> None:
        """Refuse all devices but CUDA, and weights that differ inside a pack.

        Raises:
            ConfigError: names the device, or the first pack and two of its weights.
        """
        if device.type != "cuda":
            raise ConfigError(f"loss_head LigerHead needs device=cuda, device is {device.type}; leave loss_head out")
        differs = (np.diff(document_weights) != 0) & (np.diff(pack_of_sample) == 0)
        if differs.any():
            first = int(differs.argmax())
            raise ConfigError(
                f"loss_head LigerHead gives all targets of a pack one weight, but the loss weighs those of pack "
                f"{pack_of_sample[first]} by {document_weights[first]:.6g} and {document_weights[first + 1]:.6g}; "
                f"leave loss_head out, or set loss to hbp_tune.components.AveTokenLoss"
            )

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
        """Give the weighted sum of token losses; see `LossHead`."""
        loss: Tensor = self._fused(
            hidden.squeeze(0), weight, labels.squeeze(0), ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32
        )
        return loss * loss_weights.amax()  # of equal weights and the zeros between them, without waiting for the device


class _ForwardGradient(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of tokens; arguments as in `LossHead`, without the first axis."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        sizes: list[int],
        gradients: "_Gradients",
        is_training: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        counts = labels != IGNORE_INDEX
        targets = labels.where(counts, 0)[:, None]
        weights = loss_weights.where(counts, 0).to(wide)[:, None]
        # Inside a function gradients are always off; flags of the inputs stay, so the caller's mode decides with them.
        grad_hidden = torch.empty_like(hidden) if is_training and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if is_training and ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=wide)
        for rows in _slices(sizes):
            h, y, w = hidden[rows], targets[rows], weights[rows]
            if grad_hidden is None and grad_weight is None:
                loss += _exponentials(h, weight, y, w)[2]
                continue
            chunk_loss, grad_logits = gradients(h, weight, y, w)
            loss += chunk_loss
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, h)
            del grad_logits  # before the next chunk's logits are made
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; torch's once_differentiable would let the constant 1 pass
            raise RuntimeError("ForwardGradientHead can be differentiated once only; set loss_head to RecomputedHead")
        # In place, as a copy of the weight's gradient may not fit. A second backward through the same graph would scale
        # twice: torch notices that saved tensors have changed, and raises.
        grad_hidden, grad_weight = (None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)
        return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.weight_dtype), *[None] * 5


# Of a chunk: hidden states, weight, targets ``[chunk, 1]`` and their weights, to the loss and the gradient of its logits.
_Gradients = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _gradients_in_place(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Hold one wide matrix, of logits and of all that they are turned into."""
    exponentials, sums, loss = _exponentials(hidden, weight, targets, weights)
    return loss, exponentials.mul_(weights / sums).scatter_add_(-1, targets, -weights).to(hidden.dtype)


def _fused_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Say the same without writing in between, for a compiler, which then holds nothing wide."""
    logits = F.linear(hidden, weight)
    wide = logits.to(weights.dtype)
    largest = wide.amax(dim=-1, keepdim=True)
    exponentials = (wide - largest).exp()
    sums = exponentials.sum(dim=-1, keepdim=True)
    loss = ((sums.log() + largest - wide.gather(-1, targets)) * weights).sum()
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets
    return loss, ((exponentials / sums - is_target.to(wide.dtype)) * weights).to(logits.dtype)


def _exponentials(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give a chunk's exponentials of logits (less their maximum), ``[chunk, vocab_size]``, their sums and the loss."""
    logits = F.linear(hidden, weight).to(weights.dtype)
    logits -= logits.amax(dim=-1, keepdim=True)
    target_logits = logits.gather(-1, targets)
    sums = logits.exp_().sum(dim=-1, keepdim=True)
    return logits, sums, ((sums.log() - target_logits) * weights).sum()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total``, which may be wider, in place."""
    # A product in bf16 would round each chunk's sum, and hold one more matrix of the weight's size.
    if total.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # for CUDA only (torch 2.8 to 2.13)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
    return _token_losses(hidden, weight, labels, loss_weights).sum()


def _token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none") * loss_weights


def _fitting_chunk_tokens(weight: Tensor) -> int:
    """Give the tokens of a chunk whose logits take half the memory of the weight's gradient, both in fp32.

    The gradient, ``[vocab_size, embed_dim]``, has to be there anyway, so logits of ``embed_dim / 2`` tokens add half of
    it, whatever the vocabulary. Under 256 rows a matrix product leaves parts of a GPU's tiles empty (they are 128 to 256
    rows high), and reads the weight too often for what it multiplies.
    """
    return max(256, weight.shape[1] // 2)


def _chunk_sizes(num_tokens: int, most: int) -> list[int]:
    """Cut tokens into as few chunks as there must be, of sizes that differ by one at most: no small last one."""
    num_chunks = -(-num_tokens // most)
    return [(num_tokens + index) // num_chunks for index in range(num_chunks)]


def _slices(sizes: list[int]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size
