"""What the tests of planning share: plain packs, costs and data, and what holds for every plan."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hbp_tune.planning.costs.cost import CostModel, ModelShape
from hbp_tune.planning.plans.packs import Packs
from hbp_tune.planning.plans.records import EpochPlan


def array(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def packs_of(*rows: Sequence[int]) -> Packs:
    """Make packs from sample ids."""
    ids = np.array(list(itertools.chain(*rows)), dtype=np.int32)
    return Packs(ids, np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64))


def rows_of(packs: Packs | EpochPlan) -> list[list[int]]:
    """Give the sample ids of each pack."""
    ids, offsets = (packs.ids, packs.offsets) if isinstance(packs, Packs) else (packs.sample_ids, packs.pack_offsets)
    return [row.tolist() for row in np.split(ids, offsets[1:-1])]


def cost_doubling_at(tokens: int) -> CostModel:
    """Make a cost of ``len * (len + tokens)``: attention counts from short documents on."""
    cost = CostModel(ModelShape(num_layers=1, linear_params=round(1e6 * tokens * 411 / 298), attention_dim=1_000_000))
    assert cost.double_len == tokens
    return cost


def chat_lengths(num_samples: int, longest: int, seed: int = 0, *, sigma: float = 0.95) -> NDArray[np.int32]:
    """Draw the lengths of chats: log-normal with a mean of 600 tokens."""
    lengths = np.random.default_rng(seed).lognormal(np.log(600) - sigma**2 / 2, sigma, num_samples)
    return np.clip(lengths, 1, longest).astype(np.int32)


def assert_lawful(plan: EpochPlan, lengths: NDArray[np.int32], placed: Iterable[int] | None = None) -> None:
    """Check what holds for every plan, whatever its input; ``placed`` are the samples that it holds, by default all."""
    ids = list(range(len(lengths)) if placed is None else placed)
    assert sorted(plan.sample_ids.tolist()) == ids, "every sample exactly once"
    pack_lens = np.array([group.pack_len for group in plan.groups])
    cut = np.minimum(lengths, pack_lens[-1])
    assert np.array_equal(plan.lengths, cut[plan.sample_ids])
    assert (pack_lens[plan.pack_group[plan.pack_of_sample]] >= plan.lengths).all(), "no sample in too short a group"
    tokens = plan.sum_per_pack(plan.lengths)
    assert (tokens <= pack_lens[plan.pack_group]).all(), "no pack over its length"
    assert tokens.sum() == cut[ids].sum(dtype=np.int64), "tokens are conserved"

    schedules = []
    for rank in range(plan.world_size):
        packs = list(plan.for_rank(rank))
        schedules.append([(pack.step, pack.micro_step, pack.group, pack.is_last_micro_step) for pack in packs])
    assert all(schedule == schedules[0] for schedule in schedules), "one pack per rank and micro-step, of one group"
    steps = [list(entries) for _, entries in itertools.groupby(schedules[0], key=lambda entry: entry[0])]
    assert [entries[0][0] for entries in steps] == list(range(plan.num_steps)), "steps follow each other without gaps"
    for entries in steps:
        assert len({group for _, _, group, _ in entries}) == 1, "a step draws from one group"
        assert [micro_step for _, micro_step, _, _ in entries] == list(range(len(entries)))
        assert [is_last for _, _, _, is_last in entries] == [False] * (len(entries) - 1) + [True]
    micro_steps = np.flatnonzero(plan.pack_first_rank == 0)
    assert np.add.reduceat(tokens, micro_steps).all(), "no micro-step without a sample"

    dtypes = {name: getattr(plan, name).dtype.name for name in ("sample_ids", "lengths", "pack_offsets", "pack_group")}
    assert dtypes == {"sample_ids": "int32", "lengths": "int32", "pack_offsets": "int64", "pack_group": "int16"}
    dtypes = {name: getattr(plan, name).dtype.name for name in ("pack_step", "pack_micro_step", "pack_first_rank")}
    assert dtypes == {"pack_step": "int32", "pack_micro_step": "int16", "pack_first_rank": "int32"}, "the hash is over bytes"
