import dataclasses
import pickle
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from hbp_tune.data import HierarchicalPackedDataset, PackBatch, TokenStore, open_token_store, pack_loader
from hbp_tune.data.batches.dataset import Layout, by_heads
from hbp_tune.planning import BalancePlanner, CpDegrees, EpochPlan, PackingGroup
from hbp_tune.planning.plans.sharding import local_rows, padded_len, share_out
from hbp_tune.planning.plans.truncation import cut_of, kept_tokens
from hbp_tune.training import AveTokenLoss
from tests.helpers import RandomTokens, mixed_lengths

GROUPS = (PackingGroup(name="short", pack_len=256), PackingGroup(name="long", pack_len=1024, cp_degree=2))
Everything = tuple[RandomTokens, TokenStore, EpochPlan, np.ndarray]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Everything:
    source = RandomTokens(mixed_lengths(80, 1024, seed=6), 100, seed=2)
    store = open_token_store([source], tmp_path_factory.mktemp("data") / "store")
    num_targets = store.num_targets_within(1024)
    plan = BalancePlanner(tokens_per_step=2048).plan(store.lengths, num_targets, GROUPS, world_size=2, seed=0)
    return source, store, plan, AveTokenLoss().document_weights(plan, num_targets)


def whole_pack(everything: Everything, index: int, layout: Layout = by_heads) -> dict[str, torch.Tensor]:
    """Join the rows of all the ranks of a pack, in the pack's order, and say what each attends to."""
    _, store, plan, weights = everything
    pack = plan.pack(index, int(plan.pack_first_rank[index]))
    ranks = range(plan.pack_first_rank[index], plan.pack_first_rank[index] + plan.cp_degrees[index])
    parts = [HierarchicalPackedDataset(store, plan, weights, rank, layout)[index] for rank in ranks]
    assert len({part.tokens.shape for part in parts}) == 1, "ranks of a pack hold equally many rows"
    slots = sum(part.tokens.shape[1] for part in parts)
    assert slots == padded_len(parts[0].num_tokens, pack.group.cp_degree, pack.group.pack_len)
    degrees = parts[0].degrees
    shares = share_out([int(n) for n in pack.lengths], slots, degrees.gather)
    order = np.concatenate([local_rows(share, rank, degrees.ulysses) for share in shares for rank in range(degrees.ulysses)])
    for rank, part in enumerate(parts):
        spans, share = part.spans, shares[rank // degrees.ulysses]
        assert np.diff(spans.cu_seqlens_q).tolist() == list(spans.query_lens) == share.query_lens.tolist()
        assert np.diff(spans.cu_seqlens_k).tolist() == list(spans.key_lens) == share.key_lens.tolist()
        assert (spans.key_rows is None) == (share.key_rows is None)
    names = ("tokens", "labels", "input_pos", "loss_weights")
    joined = {name: torch.cat([getattr(part, name) for part in parts], dim=1)[0] for name in names}
    return {name: values[np.argsort(order)] for name, values in joined.items()}


def by_queries(cp_degree: int, doc_lens: Sequence[int], padded: int) -> CpDegrees:
    return CpDegrees(gather=cp_degree)


@pytest.mark.parametrize("layout", [by_heads, by_queries])
def test_documents_keep_tokens_positions_and_labels_to_themselves(everything: Everything, layout: Layout) -> None:
    source, _, plan, _ = everything
    for index in range(plan.num_packs):
        pack = whole_pack(everything, index, layout)
        start = 0
        for sample_id in plan.pack(index, int(plan.pack_first_rank[index])).sample_ids:
            sample = source[int(sample_id)]
            rows = slice(start, start + len(sample["tokens"]))
            assert pack["tokens"][rows].tolist() == sample["tokens"]
            assert pack["input_pos"][rows].tolist() == list(range(len(sample["tokens"])))
            assert pack["labels"][rows].tolist() == [*sample["labels"][1:], -100]
            start = rows.stop
        assert (pack["labels"][start:] == -100).all()
        assert len(pack["tokens"]) % 128 == 0


def test_weights_sum_to_one_in_every_step_and_stand_on_targets_only(everything: Everything) -> None:
    _, _, plan, _ = everything
    total = np.zeros(plan.num_steps)
    for index in range(plan.num_packs):
        pack = whole_pack(everything, index)
        assert torch.equal(pack["loss_weights"] > 0, pack["labels"] != -100)
        total[plan.pack_step[index]] += float(pack["loss_weights"].double().sum())
    np.testing.assert_allclose(total, 1.0, atol=1e-5)


def test_an_empty_pack_is_one_unit_of_padding(tmp_path: Path) -> None:
    source = RandomTokens([9], 100, seed=2)
    store = open_token_store([source], tmp_path / "store")
    plan = BalancePlanner().plan(store.lengths, store.num_targets_within(256), GROUPS, world_size=2, seed=0)
    weights = np.ones(1)
    batches = [HierarchicalPackedDataset(store, plan, weights, rank)[int(plan.indices_for_rank(rank)[0])] for rank in (0, 1)]
    empty = next(batch for batch in batches if batch.num_tokens == 0)
    assert empty.spans.query_lens == empty.spans.key_lens == (128,)
    assert empty.tokens.shape == (1, 128)
    assert (empty.labels == -100).all()
    assert empty.is_last_micro_step


def truncated_batch(source: RandomTokens, tmp_path: Path, cut: str) -> PackBatch:
    store = open_token_store([source], tmp_path / "store")
    plan = BalancePlanner(overlong=cut).plan(store.lengths, store.num_targets_within(256, cut), GROUPS[:1], world_size=1, seed=0)
    assert plan.truncated.tolist() == [0]
    index = next(i for i in plan.indices_for_rank(0) if 0 in plan.pack(int(i), 0).sample_ids)
    return HierarchicalPackedDataset(store, plan, np.ones(2), 0)[int(index)]


def test_a_truncated_sample_predicts_nothing_past_its_cut(tmp_path: Path) -> None:
    source = RandomTokens([300, 20], 100, seed=2)
    batch = truncated_batch(source, tmp_path, "truncate_end")
    sample = source[0]
    assert batch.tokens[0, :256].tolist() == sample["tokens"][:256]
    assert batch.labels[0, :256].tolist() == [*sample["labels"][1:256], -100]


@pytest.mark.parametrize("cut", ["truncate", "truncate_start"])
def test_a_sample_whose_prompt_is_cut_keeps_its_answer(tmp_path: Path, cut: str) -> None:
    source = RandomTokens([330, 20], 100, seed=2)  # the first 110 tokens are its prompt
    sample = source[0]
    is_target = np.array(sample["labels"]) != -100
    kept = kept_tokens(is_target, 256, cut_of(cut))
    batch = truncated_batch(source, tmp_path, cut)
    assert batch.tokens[0, :256].tolist() == [sample["tokens"][i] for i in kept]
    assert batch.labels[0, :256].tolist() == [*(sample["labels"][i] for i in kept[1:]), -100]
    assert batch.input_pos[0, :256].tolist() == list(range(256)), "positions run through"
    assert (batch.labels[0, :256] != -100).sum() == 220, "every target is there"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_planned_packs_in_order(everything: Everything, num_workers: int) -> None:
    _, store, plan, weights = everything
    dataset = HierarchicalPackedDataset(store, plan, weights, rank=1)
    before = torch.get_rng_state()
    batches = list(pack_loader(dataset, plan.indices_for_rank(1, first_step=1, last_step=4), num_workers))
    assert torch.equal(torch.get_rng_state(), before), "loading must not draw from the global generator"
    planned = [pack for pack in plan.for_rank(1) if 1 <= pack.step < 4]
    assert [(b.step, b.is_last_micro_step, b.group) for b in batches] == [
        (p.step, p.is_last_micro_step, p.group) for p in planned
    ]
    assert [b.num_tokens for b in batches] == [int(p.lengths.sum()) for p in planned]


@pytest.mark.parametrize("layout", [by_heads, by_queries])
def test_every_row_of_a_document_has_its_class(everything: Everything, layout: Layout) -> None:
    _, store, plan, weights = everything
    classes = np.arange(7, 7 + len(plan.sample_ids))
    for index in np.flatnonzero(plan.sum_per_pack(plan.lengths) > 0)[::5]:
        pack = plan.pack(int(index), int(plan.pack_first_rank[index]))
        ranks = range(plan.pack_first_rank[index], plan.pack_first_rank[index] + plan.cp_degrees[index])
        datasets = [HierarchicalPackedDataset(store, plan, weights, rank, layout, classes) for rank in ranks]
        batches = [dataset[int(index)] for dataset in datasets]
        got = torch.cat([batch.classes[0] for batch in batches])
        first = int(plan.pack_offsets[index]) + 7
        counts = {first + doc: int(length) for doc, length in enumerate(pack.lengths)}
        counts[0] = len(got) - sum(counts.values())  # padding
        assert {int(name): int(count) for name, count in zip(*got.unique(return_counts=True), strict=True)} == {
            name: count for name, count in counts.items() if count
        }
        starts = torch.cat([(batch.classes * (batch.input_pos == 0) * (batch.classes > 0))[0] for batch in batches])
        assert sorted(starts[starts > 0].tolist()) == list(range(first, first + len(pack.lengths)))


def test_a_batch_is_the_same_after_its_way_from_a_worker(everything: Everything) -> None:
    _, store, plan, weights = everything
    classes = np.arange(len(plan.sample_ids))
    index = int(np.flatnonzero(plan.cp_degrees == 2)[0])
    batch = HierarchicalPackedDataset(store, plan, weights, int(plan.pack_first_rank[index]), by_queries, classes)[index]
    arrived = pickle.loads(ForkingPickler.dumps(batch))
    for field in dataclasses.fields(batch):
        left, right = getattr(batch, field.name), getattr(arrived, field.name)
        if isinstance(left, torch.Tensor):
            torch.testing.assert_close(right, left, rtol=0, atol=0)
        elif field.name != "spans":
            assert left == right, field.name
    assert torch.equal(batch.spans.key_rows, arrived.spans.key_rows)
    assert torch.equal(batch.spans.cu_seqlens_k, arrived.spans.cu_seqlens_k)


def test_training_batches_have_no_classes(everything: Everything) -> None:
    _, store, plan, weights = everything
    assert HierarchicalPackedDataset(store, plan, weights, 0)[int(plan.indices_for_rank(0)[0])].classes is None
