"""Packs of random tokens, where only lengths count: for profiling and benchmarks."""

from collections.abc import Sequence

import torch

from hbp_tune.data.batches.batch import PackBatch, Spans
from hbp_tune.data.tokenizing.conversation import IGNORE_INDEX
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.planning.plans.sharding import CpDegrees, share_of_rank


def random_batch(
    doc_lens: Sequence[int], group: PackingGroup, vocab_size: int, *, degrees: CpDegrees | None = None, cp_rank: int = 0
) -> PackBatch:
    """Make one rank's part of a full pack of random tokens; each label is the next token, and all targets weigh the same.

    Args:
        doc_lens: tokens of its documents, ``pack_len`` together.
        group: the pack's.
        vocab_size: tokens are below it.
        degrees: how the pack's ranks divide attention; Ulysses where left out.
        cp_rank: whose part.
    """
    assert sum(doc_lens) == group.pack_len, "made packs are full"
    degrees = degrees or CpDegrees(ulysses=group.cp_degree)
    part, rows = share_of_rank(doc_lens, group.pack_len, degrees, cp_rank)
    tokens = torch.randint(vocab_size, (group.pack_len,), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1)
    labels[torch.tensor(doc_lens).cumsum(0) - 1] = IGNORE_INDEX
    weights = (labels != IGNORE_INDEX).float() / (labels != IGNORE_INDEX).sum()
    positions = torch.cat([torch.arange(length) for length in doc_lens])
    return PackBatch(
        tokens=tokens[rows][None],
        labels=labels[rows][None],
        input_pos=positions[rows][None],
        loss_weights=weights[rows][None],
        spans=Spans.of_part(part),
        degrees=degrees,
        group=group,
        num_tokens=group.pack_len,
        step=0,
        is_last_micro_step=True,
    )
