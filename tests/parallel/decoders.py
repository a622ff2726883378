"""A tiny decoder with its loss inside, and what of its operators runs when."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.llama3_1 import llama3_1

from hbp_tune.models import DecoderParts, adapt_decoder
from tests.parallel.collectives import collective_name

NUM_LAYERS = 4


class OneDocument:
    """Stands for the context of a pack that is one document."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True)[0].transpose(0, 1)


class OperatorCounter(TorchDispatchMode):
    """Counts attention and context-parallel collectives that really run: what is taken from memory does not come this far."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0
        self.collectives: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else torch would run compiled layers eagerly while it counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1]
        self.attention += name.startswith("_scaled_dot_product") and "backward" not in name
        if collective := collective_name(func):
            self.collectives[collective] += 1
        return func(*args, **(kwargs or {}))


def tiny_decoder() -> tuple[nn.Module, DecoderParts]:
    """Make the same weights every time; 4 query heads, 2 KV heads."""
    torch.manual_seed(0)
    model = llama3_1(
        vocab_size=64, num_layers=NUM_LAYERS, num_heads=4, num_kv_heads=2, embed_dim=32, intermediate_dim=64, max_seq_len=512
    )
    return model, adapt_decoder(model)


def forward(model: nn.Module, num_tokens: int, context: Any = None) -> Tensor:
    """Give the mean loss of random tokens, which depend on their number alone."""
    tokens = torch.randint(64, (1, num_tokens), generator=torch.Generator().manual_seed(num_tokens))
    weights = torch.full((1, num_tokens), 1 / num_tokens)
    positions = torch.arange(num_tokens)[None]
    return model(tokens, mask=context or OneDocument(), input_pos=positions, labels=tokens, loss_weights=weights)


def take_gradients(model: nn.Module) -> list[Tensor]:
    """Give the gradients and forget them."""
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return grads
