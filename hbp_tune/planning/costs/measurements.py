"""What running a packing group on a machine gave: seconds and memory, or that it does not fit."""

from dataclasses import dataclass

from hbp_tune.errors import ConfigError
from hbp_tune.planning.plans.records import PackingGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One group, run for a few micro-steps on every rank with packs of the same documents.

    Args:
        group: pack length, CP degree and recomputation as run.
        world_size: ranks, all of them with a pack or their part of one.
        doc_lens: tokens of each document of a pack.
        micro_step_s: median seconds of forward and backward of one pack, on the slowest rank; None where memory ran out.
        peak_gib: most memory of the fullest rank; None where memory ran out.

    Raises:
        ConfigError: the documents do not fit into the pack, or only one of seconds and memory is there.
    """

    group: PackingGroup
    world_size: int
    doc_lens: tuple[int, ...]
    micro_step_s: float | None
    peak_gib: float | None

    def __post_init__(self) -> None:
        if not 0 < self.tokens <= self.group.pack_len:
            raise ConfigError(f"measured pack of {self.tokens} tokens must have 1 to pack_len={self.group.pack_len}")
        if (self.micro_step_s is None) != (self.peak_gib is None):
            raise ConfigError(f"measurement of {self.group.name!r}: micro_step_s and peak_gib must both be there, or neither")

    @property
    def fits(self) -> bool:
        """Whether memory was enough."""
        return self.micro_step_s is not None

    @property
    def tokens(self) -> int:
        """Real tokens of a pack."""
        return sum(self.doc_lens)

    @property
    def squares(self) -> int:
        """``sum(len ** 2)`` over the documents of a pack."""
        return sum(length**2 for length in self.doc_lens)

    @property
    def s_per_token(self) -> float:
        """Seconds of one rank for each token that it trains; infinite where memory ran out."""
        return float("inf") if self.micro_step_s is None else self.micro_step_s * self.group.cp_degree / self.tokens
