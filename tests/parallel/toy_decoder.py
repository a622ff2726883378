"""A decoder that owes nothing to torchtune: what `parallel` asks of a model is all here."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbp_tune.parallel.loss_head import ForwardGradientHead


class ToyLayer(nn.Module):
    """Pre-norm attention and MLP; the pack comes as `mask` and does the attention."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.split = [heads, kv_heads, kv_heads]
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, dim // heads * sum(self.split))
        self.out, self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, mask: "PackContext") -> Tensor:  # noqa: F821
        q, k, v = self.qkv(self.norm(x))[0].unflatten(-1, (sum(self.split), -1)).split(self.split, dim=1)
        x = x + self.out(mask.attend(q, k, v).flatten(1))[None]
        return x + self.down(F.silu(self.up(self.mlp_norm(x))))


class ToyDecoder(nn.Module):
    """Tokens and positions in, the weighted sum of token losses out."""

    def __init__(self, *, layers: int = 2, dim: int = 64, heads: int = 8, kv_heads: int = 2, vocab: int = 64) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab, dim), nn.Embedding(1024, dim)
        self.layers = nn.ModuleList(ToyLayer(dim, heads, kv_heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens: Tensor, *, mask: object, input_pos: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions(input_pos)
        for layer in self.layers:
            x = layer(x, mask=mask)
        return ForwardGradientHead()(self.norm(x), self.head.weight, labels, loss_weights)


def build_toy(seed: int = 0, dtype: torch.dtype = torch.float32, **shape: int) -> ToyDecoder:
    """Draw the same weights everywhere, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ToyDecoder(**shape).to(dtype)
