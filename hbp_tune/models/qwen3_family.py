"""Qwen3's dense decoders, which torchtune 0.6.1 lacks, by torchtune's modules; and the checkpointer that reads their weights."""

from typing import Any

from torch import Tensor, nn
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import FeedForward, MultiHeadAttention, RMSNorm, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.tied_linear import TiedLinear
from torchtune.training import FullModelHFCheckpointer

from hbp_tune.models.torchtune_seam import know_weights

VOCAB_SIZE, HEAD_DIM, NORM_EPS, ROPE_BASE = 151_936, 128, 1e-6, 1_000_000.0
# max_position_embeddings of the released checkpoints: 32K tokens and an answer of 8K.
MAX_SEQ_LEN = 40_960


class HeadNormLinear(nn.Linear):
    """A projection to heads, each of which is normalised.

    Qwen3 normalises queries and keys before it rotates them. torchtune's own ``q_norm`` and ``k_norm`` come after, which is not
    the same: the weights of a norm do not commute with rotations.

    Args:
        embed_dim: features that come in.
        num_heads: of queries, or of keys.
        head_dim: features of each.
        norm_eps: of the norm.
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int, norm_eps: float) -> None:
        super().__init__(embed_dim, num_heads * head_dim, bias=False)
        self.head_dim = head_dim
        self.norm = RMSNorm(head_dim, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Project ``[..., embed_dim]`` to ``[..., num_heads * head_dim]``."""
        heads: Tensor = self.norm(super().forward(x).unflatten(-1, (-1, self.head_dim)))
        return heads.flatten(-2)


def qwen3(
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    vocab_size: int = VOCAB_SIZE,
    head_dim: int = HEAD_DIM,
    max_seq_len: int = MAX_SEQ_LEN,
    norm_eps: float = NORM_EPS,
    rope_base: float = ROPE_BASE,
    tie_word_embeddings: bool = False,
) -> TransformerDecoder:
    """Build a dense Qwen3 decoder (Qwen3 technical report, arXiv 2505.09388): Qwen2.5's, with normalised heads, without biases.

    Args:
        num_layers: transformer layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        embed_dim: width of the residual stream; need not be ``num_heads * head_dim``.
        intermediate_dim: width between the feed-forward projections.
        vocab_size: rows of the embedding.
        head_dim: features of a head.
        max_seq_len: positions that are encoded.
        norm_eps: of all norms.
        rope_base: ``rope_theta`` in config.json.
        tie_word_embeddings: whether the output projection is the embedding.
    """
    rope = Qwen2RotaryPositionalEmbeddings(dim=head_dim, max_seq_len=max_seq_len, base=rope_base)
    layers = nn.ModuleList(
        TransformerSelfAttentionLayer(
            attn=MultiHeadAttention(
                embed_dim=embed_dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                q_proj=HeadNormLinear(embed_dim, num_heads, head_dim, norm_eps),
                k_proj=HeadNormLinear(embed_dim, num_kv_heads, head_dim, norm_eps),
                v_proj=nn.Linear(embed_dim, num_kv_heads * head_dim, bias=False),
                output_proj=nn.Linear(num_heads * head_dim, embed_dim, bias=False),
                pos_embeddings=rope,
                max_seq_len=max_seq_len,
            ),
            mlp=FeedForward(
                gate_proj=nn.Linear(embed_dim, intermediate_dim, bias=False),
                down_proj=nn.Linear(intermediate_dim, embed_dim, bias=False),
                up_proj=nn.Linear(embed_dim, intermediate_dim, bias=False),
            ),
            sa_norm=RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=RMSNorm(embed_dim, eps=norm_eps),
        )
        for _ in range(num_layers)
    )
    embedding = nn.Embedding(vocab_size, embed_dim)
    return TransformerDecoder(
        tok_embeddings=embedding,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(embedding) if tie_word_embeddings else nn.Linear(embed_dim, vocab_size, bias=False),
    )


def qwen3_0_6b() -> TransformerDecoder:
    """Build Qwen3-0.6B."""
    return qwen3(num_layers=28, num_heads=16, num_kv_heads=8, embed_dim=1024, intermediate_dim=3072, tie_word_embeddings=True)


def qwen3_1_7b() -> TransformerDecoder:
    """Build Qwen3-1.7B."""
    return qwen3(num_layers=28, num_heads=16, num_kv_heads=8, embed_dim=2048, intermediate_dim=6144, tie_word_embeddings=True)


def qwen3_4b() -> TransformerDecoder:
    """Build Qwen3-4B."""
    return qwen3(num_layers=36, num_heads=32, num_kv_heads=8, embed_dim=2560, intermediate_dim=9728, tie_word_embeddings=True)


def qwen3_8b() -> TransformerDecoder:
    """Build Qwen3-8B."""
    return qwen3(num_layers=36, num_heads=32, num_kv_heads=8, embed_dim=4096, intermediate_dim=12_288)


def qwen3_14b() -> TransformerDecoder:
    """Build Qwen3-14B."""
    return qwen3(num_layers=40, num_heads=40, num_kv_heads=8, embed_dim=5120, intermediate_dim=17_408)


def qwen3_32b() -> TransformerDecoder:
    """Build Qwen3-32B."""
    return qwen3(num_layers=64, num_heads=64, num_kv_heads=8, embed_dim=5120, intermediate_dim=25_600)


class Qwen3Checkpointer(FullModelHFCheckpointer):
    """torchtune's checkpointer for Hugging Face files, which knows Qwen3's weights too.

    Args:
        arguments: those of ``torchtune.training.FullModelHFCheckpointer``, without ``model_type``.
    """

    def __init__(self, **arguments: Any) -> None:
        know_weights(
            {
                "model.layers.{}.self_attn.q_norm.weight": "layers.{}.attn.q_proj.norm.scale",
                "model.layers.{}.self_attn.k_norm.weight": "layers.{}.attn.k_proj.norm.scale",
            }
        )
        super().__init__(**arguments, model_type="QWEN2")
