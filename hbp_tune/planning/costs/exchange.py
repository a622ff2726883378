"""What context parallelism moves between ranks and keeps for the backward, counted in rows times heads: no clock, no tensor."""

import math
from dataclasses import dataclass

from hbp_tune.planning.plans.sharding import CpDegrees


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionHeads:
    """Heads of one attention layer.

    Args:
        query: query heads.
        kv: key and value heads, a divisor of ``query``.
    """

    query: int
    kv: int

    def over(self, ulysses_degree: int) -> "AttentionHeads":
        """Give the heads that Ulysses sends, a multiple of its degree.

        KV heads are repeated up to their least common multiple with the degree; where the query heads of a KV head do not
        divide by the repeats, empty ones are added to them. Llama's 32/8 over 8 stays as it is; Qwen2.5's 28/4 becomes 32/8.
        """
        kv = math.lcm(self.kv, ulysses_degree)
        per_kv = -(-(self.query // self.kv) // (kv // self.kv))
        return AttentionHeads(query=kv * per_kv, kv=kv)


def moved_heads(heads: AttentionHeads, degrees: CpDegrees, padded: int, gathered_len: int) -> float:
    """Count what a rank receives in one layer's forward, in rows times heads; times ``head_dim * itemsize`` gives bytes.

    The backward moves as much again, in the other direction.

    Args:
        heads: of the model.
        degrees: how the CP group divides attention.
        padded: rows of the pack.
        gathered_len: rows that each part gives to all others, from `share_out`.
    """
    sent = heads.over(degrees.ulysses)
    exchanged = (degrees.ulysses - 1) / degrees.ulysses * padded / degrees.cp_degree * (2 * sent.query + 2 * sent.kv)
    gathered = (degrees.gather - 1) * gathered_len * 2 * sent.kv / degrees.ulysses
    return exchanged + gathered


def kept_heads(heads: AttentionHeads, degrees: CpDegrees, padded: int, key_rows: int) -> float:
    """Count queries, keys and values that a rank keeps for one layer's backward, in rows times heads.

    Args:
        heads: of the model.
        degrees: how the CP group divides attention.
        padded: rows of the pack.
        key_rows: keys of all runs of a part.
    """
    sent = heads.over(degrees.ulysses)
    return (padded / degrees.gather * sent.query + key_rows * 2 * sent.kv) / degrees.ulysses
