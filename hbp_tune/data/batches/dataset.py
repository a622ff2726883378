"""The hierarchical packed data set: planned packs to tensors, for one rank."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from hbp_tune.data.batches.batch import PackBatch, Spans
from hbp_tune.data.store.store import TokenStore
from hbp_tune.data.tokenizing.conversation import IGNORE_INDEX
from hbp_tune.planning.plans.records import EpochPlan
from hbp_tune.planning.plans.sharding import CpDegrees, padded_len, share_of_rank

# How a pack's ranks divide attention, from (cp_degree, doc_lens, padded); every rank of the pack decides the same.
Layout = Callable[[int, Sequence[int], int], CpDegrees]


def by_heads(cp_degree: int, doc_lens: Sequence[int], padded: int) -> CpDegrees:
    """Divide attention by heads alone (Ulysses)."""
    return CpDegrees(ulysses=cp_degree)


class HierarchicalPackedDataset(Dataset[PackBatch]):
    """Builds this rank's rows of any planned pack.

    Args:
        store: tokens by sample id.
        plan: of one epoch.
        document_weights: ``float64[placed]``, loss weight of each target of a placed sample, aligned with
            ``plan.sample_ids``.
        rank: whose rows to build.
        layout: how the ranks of a pack divide attention, which decides the rows that each holds.
        document_classes: ``int64[placed]``, what to tell the rows of placed samples apart by; None where nobody asks.
    """

    def __init__(
        self,
        store: TokenStore,
        plan: EpochPlan,
        document_weights: NDArray[np.float64],
        rank: int,
        layout: Layout = by_heads,
        document_classes: NDArray[np.int64] | None = None,
    ) -> None:
        self._store = store
        self._plan = plan
        self._document_weights = document_weights
        self._rank = rank
        self._layout = layout
        self._document_classes = document_classes

    def __len__(self) -> int:
        return self._plan.num_packs

    def __getitem__(self, index: int) -> PackBatch:
        """Build pack ``index`` of the plan, which must be one of this rank's."""
        pack = self._plan.pack(int(index), self._rank)
        tokens, is_target = self._store.read(pack.sample_ids, pack.lengths, self._plan.cut)
        num_tokens = len(tokens)
        slots = padded_len(num_tokens, pack.group.cp_degree, pack.group.pack_len)
        doc_lens = [int(length) for length in pack.lengths]
        ends = np.cumsum(doc_lens, dtype=np.int64)

        padded = np.zeros(slots, dtype=np.int64)
        padded[:num_tokens] = tokens
        labels = np.full(slots, IGNORE_INDEX, dtype=np.int64)
        labels[: max(0, num_tokens - 1)] = np.where(is_target[1:], tokens[1:], IGNORE_INDEX)
        labels[ends - 1] = IGNORE_INDEX  # the last token of a document must not predict the next document's first
        span = slice(self._plan.pack_offsets[pack.index], self._plan.pack_offsets[pack.index + 1])
        weights = np.zeros(slots, dtype=np.float32)
        weights[:num_tokens] = np.repeat(self._document_weights[span], pack.lengths)
        weights[labels == IGNORE_INDEX] = 0.0
        positions = np.zeros(slots, dtype=np.int64)
        positions[:num_tokens] = np.arange(num_tokens) - np.repeat(ends - doc_lens, doc_lens)

        degrees = self._layout(pack.group.cp_degree, doc_lens, slots)
        part, rows = share_of_rank(doc_lens, slots, degrees, pack.cp_rank)
        classes = None
        if self._document_classes is not None:
            row_classes = np.zeros(slots, dtype=np.int64)
            row_classes[:num_tokens] = np.repeat(self._document_classes[span], pack.lengths)
            classes = torch.from_numpy(row_classes[rows])[None]
        return PackBatch(
            tokens=torch.from_numpy(padded[rows])[None],
            labels=torch.from_numpy(labels[rows])[None],
            input_pos=torch.from_numpy(positions[rows])[None],
            loss_weights=torch.from_numpy(weights[rows])[None],
            spans=Spans.of_part(part),
            degrees=degrees,
            group=pack.group,
            num_tokens=num_tokens,
            step=pack.step,
            is_last_micro_step=pack.is_last_micro_step,
            classes=classes,
        )


def pack_loader(dataset: HierarchicalPackedDataset, indices: NDArray[np.int64], num_workers: int = 0) -> StatefulDataLoader:
    """Load packs in the order of ``indices``, ahead of training where there are workers.

    The loader's own state is never saved: it would count packs that workers fetched ahead as trained. A resumed run
    builds its loader from the first step that was not completed.
    """
    return StatefulDataLoader(
        dataset,
        batch_size=None,
        sampler=indices.tolist(),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # so that starting an epoch leaves the global generator alone
    )
