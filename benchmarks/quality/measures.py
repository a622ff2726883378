"""What a trained model is measured by: held-out loss by length, and retrieval by length."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from quality.corpus import BUCKETS, CODES, MAX_LEN, RETRIEVAL_LENS, Corpus
from quality.training import Learner, on_one_rank

from hbp_tune.data import HierarchicalPackedDataset, TokenStore
from hbp_tune.planning import PackingGroup, plan_baseline


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Of one model, by the upper end of the length bucket.

    Args:
        loss: mean over the targets of the held-out chats of the bucket.
        retrieval: share of the codes that are the likeliest token after what the right answer has before them, in generated
            chats of that length.
    """

    loss: dict[int, float]
    retrieval: dict[int, float]


def measure(learner: Learner, corpus: Corpus) -> Measures:
    """Measure a model on what it was not trained on."""
    loss = {}
    losses, _ = _by_document(learner, corpus.held_out)
    buckets = np.searchsorted(BUCKETS, corpus.held_out.lengths)
    for index, bucket in enumerate(BUCKETS):
        loss[bucket] = float(np.concatenate([losses[i] for i in np.flatnonzero(buckets == index)]).mean())
    _, hits = _by_document(learner, corpus.needles)
    lens = np.searchsorted(RETRIEVAL_LENS, corpus.needles.lengths)
    retrieval = {
        length: float(np.concatenate([_code_hits(corpus.needles, i, hits[i]) for i in np.flatnonzero(lens == index)]).mean())
        for index, length in enumerate(RETRIEVAL_LENS)
    }
    return Measures(loss=loss, retrieval=retrieval)


def _by_document(learner: Learner, store: TokenStore) -> tuple[list[NDArray[np.float32]], list[NDArray[np.bool_]]]:
    """Give the loss of every target of every sample, and whether it was the likeliest token, by sample id."""
    whole = PackingGroup(name="whole", pack_len=MAX_LEN)
    plan = on_one_rank(plan_baseline("none", store.lengths, whole, world_size=1, seed=0))
    packs = HierarchicalPackedDataset(store, plan, np.ones(len(store)), rank=0)
    losses, hits = [], []
    for index in np.argsort(plan.sample_ids):  # a pack a sample
        with torch.no_grad():
            learner.forward(packs[int(index)])
        sample_losses, sample_hits = learner.head.take()
        losses.append(sample_losses.numpy())
        hits.append(sample_hits.numpy())
    return losses, hits


def _code_hits(store: TokenStore, sample_id: int, is_hit: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Take the codes out of a chat's targets."""
    tokens, is_target = store.read(np.array([sample_id], dtype=np.int32), store.lengths[[sample_id]])
    targets = tokens[1:][is_target[1:]]  # nothing comes before the first token
    return is_hit[np.isin(targets, CODES)]
