import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hbp_tune.errors import ConfigError
from hbp_tune.parallel import (
    AllGatherKV,
    AutoContextParallel,
    Ulysses,
    UlyssesAllGather,
    build_cp_meshes,
    describe_layouts,
    sdpa_per_document,
    select_context_parallel,
)
from hbp_tune.parallel.context_parallel import ContextParallel
from hbp_tune.planning import AttentionHeads, CpDegrees, PackingGroup
from hbp_tune.planning.costs.exchange import moved_heads
from hbp_tune.planning.plans.sharding import share_out
from tests.parallel.collectives import CollectiveCounter, cuda_all_to_all
from tests.parallel.packs import dense, qkv, rank_view
from tests.ranks import RankPool

NUM_TOKENS, HEAD_DIM = 64, 8
# Documents that end at, start at and cross the borders of 2 and 4 shards, documents of one token, many short ones.
DOC_LENS = {
    "one": (64,),
    "borders": (16, 16, 32),
    "crossing": (1, 29, 3, 1, 29, 1),
    "single tokens": (1,) * 16 + (48,),
    "short": (3, 4, 2, 1) * 6 + (4,),
}
MESHES: dict[int, dict] = {}
Result = tuple[list[Tensor], dict[str, int], float]


def meshes_of(cp_degree: int) -> dict:
    """Build the meshes of every layout of a degree, once per rank of the pool."""
    if cp_degree not in MESHES:
        layouts = [CpDegrees(ulysses=u, gather=cp_degree // u) for u in range(1, cp_degree + 1) if cp_degree % u == 0]
        MESHES[cp_degree] = build_cp_meshes(layouts, "cpu", timeout=timedelta(seconds=60))
    return MESHES[cp_degree]


def attend_job(degrees: CpDegrees, heads: int, kv_heads: int, doc_lens: tuple[int, ...], cuda_path: bool) -> Result:
    """Give this rank's rows of the output and of the inputs' gradients, its collectives and the elements received."""
    rows, spans = rank_view(doc_lens, NUM_TOKENS, degrees, dist.get_rank() % degrees.cp_degree)
    local = [x.detach()[rows].requires_grad_() for x in qkv(NUM_TOKENS, heads, kv_heads)]
    scheme = UlyssesAllGather(ulysses_degree=degrees.ulysses)  # all schemes run the same function
    with cuda_all_to_all() if cuda_path else nullcontext(), CollectiveCounter() as forward:
        out = scheme(*local, mesh=meshes_of(degrees.cp_degree)[degrees], attention=sdpa_per_document, spans=spans)
        grads = torch.autograd.grad((out * loss_weights(out)[rows]).sum(), local)
    return [out.detach(), *grads], dict(forward.calls), forward.received


def loss_weights(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(NUM_TOKENS, *out.shape[1:], generator=generator, dtype=out.dtype)


def joined(results: Sequence[Result], degrees: CpDegrees, doc_lens: Sequence[int]) -> list[Tensor]:
    """Put the rows of a CP group's ranks back in the pack's order."""
    rows = torch.cat([rank_view(doc_lens, NUM_TOKENS, degrees, rank)[0] for rank in range(degrees.cp_degree)])
    parts = zip(*(tensors for tensors, _, _ in results[: degrees.cp_degree]), strict=True)
    return [torch.cat(part)[rows.argsort()] for part in parts]


@pytest.mark.parametrize("doc_lens", DOC_LENS.values(), ids=DOC_LENS)
@pytest.mark.parametrize(
    ("degrees", "heads", "kv_heads"),
    [
        (CpDegrees(ulysses=2), 4, 2),
        (CpDegrees(ulysses=2), 4, 1),
        (CpDegrees(ulysses=4), 4, 2),
        (CpDegrees(ulysses=4), 8, 1),
        (CpDegrees(ulysses=4), 12, 4),
        (CpDegrees(ulysses=4), 7, 1),
        (CpDegrees(ulysses=4), 6, 2),
        (CpDegrees(ulysses=4), 2, 2),
        (CpDegrees(gather=2), 4, 2),
        (CpDegrees(gather=4), 3, 1),
        (CpDegrees(ulysses=2, gather=2), 4, 2),
        (CpDegrees(ulysses=2, gather=2), 14, 2),
        (CpDegrees(ulysses=2, gather=2), 7, 1),
    ],
    ids=lambda value: f"u{value.ulysses}g{value.gather}" if isinstance(value, CpDegrees) else str(value),
)
def test_every_division_equals_one_process(
    ranks: Callable[[int], RankPool], degrees: CpDegrees, heads: int, kv_heads: int, doc_lens: tuple[int, ...]
) -> None:
    whole = qkv(NUM_TOKENS, heads, kv_heads)
    out = dense(*whole, doc_lens)
    want = [out.detach(), *torch.autograd.grad((out * loss_weights(out)).sum(), whole)]
    results = ranks(degrees.cp_degree).run(attend_job, degrees, heads, kv_heads, doc_lens, False)
    for got, reference in zip(joined(results, degrees, doc_lens), want, strict=True):
        assert (got - reference).norm() <= 1e-10 * reference.norm()


@pytest.mark.parametrize("degrees", [CpDegrees(ulysses=4), CpDegrees(ulysses=2, gather=2)], ids=["u4", "u2g2"])
def test_the_all_to_all_of_cuda_gives_the_same(ranks: Callable[[int], RankPool], degrees: CpDegrees) -> None:
    for doc_lens in DOC_LENS.values():
        with_gather = ranks(4).run(attend_job, degrees, 8, 2, doc_lens, False)
        with_trade = ranks(4).run(attend_job, degrees, 8, 2, doc_lens, True)
        for got, want in zip(joined(with_trade, degrees, doc_lens), joined(with_gather, degrees, doc_lens), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("degrees", "heads", "kv_heads", "calls"),
    [
        # Forward and backward of one layer: one exchange before attention and one after, one gather before it.
        (CpDegrees(ulysses=2), 4, 2, {"shard_dim_alltoall": 4}),
        (CpDegrees(ulysses=4), 4, 1, {"shard_dim_alltoall": 4}),
        (CpDegrees(ulysses=4), 7, 1, {"shard_dim_alltoall": 4}),
        (CpDegrees(gather=4), 8, 2, {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}),
        (
            CpDegrees(ulysses=2, gather=2),
            8,
            2,
            {"shard_dim_alltoall": 4, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1},
        ),
    ],
    ids=["u2", "u4 repeated kv", "u4 filled heads", "g4", "u2g2"],
)
def test_collectives_and_bytes_of_a_layer_are_the_least_there_are(
    ranks: Callable[[int], RankPool], degrees: CpDegrees, heads: int, kv_heads: int, calls: dict[str, int]
) -> None:
    for doc_lens in DOC_LENS.values():
        results = ranks(4).run(attend_job, degrees, heads, kv_heads, doc_lens, True)
        gathered_len = share_out(doc_lens, NUM_TOKENS, degrees.gather)[0].gathered_len
        moved = moved_heads(AttentionHeads(query=heads, kv=kv_heads), degrees, NUM_TOKENS, gathered_len)
        for _, got, received in results:
            # Nothing to gather where every document is whole: no collective at all.
            assert got == {name: n for name, n in calls.items() if gathered_len or name == "shard_dim_alltoall"}
            assert received == 2 * moved * HEAD_DIM, "forward and backward"


def test_ulysses_volume_by_hand() -> None:
    # Llama 3.1 8B over 8: a rank holds S / 8 rows of 32 + 8 + 8 heads, sends 7/8 of them, and gets 7/8 of 32 heads back.
    volume = moved_heads(AttentionHeads(query=32, kv=8), CpDegrees(ulysses=8), 8, 0)
    assert volume == pytest.approx(7 / 8 * (32 + 8 + 8 + 32))
    # Gathering brings 7/8 of all rows of 8 + 8 heads.
    assert moved_heads(AttentionHeads(query=32, kv=8), CpDegrees(gather=8), 8, 1) == 7 * 16


@pytest.mark.parametrize(
    ("heads", "degree", "sent"),
    [
        ((32, 8), 8, (32, 8)),
        ((32, 8), 16, (32, 16)),
        ((28, 4), 8, (32, 8)),
        ((14, 2), 8, (16, 8)),
        ((12, 2), 8, (16, 8)),
        ((40, 8), 8, (40, 8)),
        ((16, 2), 4, (16, 4)),
        ((64, 8), 8, (64, 8)),
        ((32, 32), 8, (32, 32)),
        ((2, 2), 4, (4, 4)),
    ],
)
def test_heads_are_repeated_and_filled_up(heads: tuple[int, int], degree: int, sent: tuple[int, int]) -> None:
    assert AttentionHeads(query=heads[0], kv=heads[1]).over(degree) == AttentionHeads(query=sent[0], kv=sent[1])


@pytest.mark.parametrize("seed", range(20))
def test_every_rank_gets_as_many_heads(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kv, per_kv, degree = (int(n) for n in torch.randint(1, 17, (3,), generator=generator))
    heads = AttentionHeads(query=kv * per_kv, kv=kv)
    sent = heads.over(degree)
    assert sent.kv == math.lcm(kv, degree)
    assert sent.query % sent.kv == sent.query % degree == 0
    assert heads.query <= sent.query < heads.query + sent.kv


# Llama 2 to 3.3 and Qwen2/2.5 in all sizes, by query and KV heads.
@pytest.mark.parametrize(
    ("heads", "degree", "layout"),
    [
        ((32, 8), 8, CpDegrees(ulysses=8)),  # Llama 3 8B, 3.2 1B
        ((24, 8), 8, CpDegrees(ulysses=8)),  # Llama 3.2 3B
        ((64, 8), 8, CpDegrees(ulysses=8)),  # Llama 3 70B, Qwen2.5 72B
        ((32, 32), 8, CpDegrees(ulysses=8)),  # Llama 2 7B
        ((40, 40), 8, CpDegrees(ulysses=8)),  # Llama 2 13B
        ((40, 8), 8, CpDegrees(ulysses=8)),  # Qwen2.5 14B, 32B
        ((128, 8), 8, CpDegrees(ulysses=8)),  # Llama 3.1 405B
        ((28, 4), 8, CpDegrees(ulysses=4, gather=2)),  # Qwen2.5 7B
        ((14, 2), 8, CpDegrees(ulysses=2, gather=4)),  # Qwen2.5 0.5B
        ((12, 2), 8, CpDegrees(ulysses=2, gather=4)),  # Qwen2.5 1.5B
        ((16, 2), 8, CpDegrees(ulysses=2, gather=4)),  # Qwen2.5 3B
        ((28, 4), 4, CpDegrees(ulysses=4)),
        ((32, 8), 16, CpDegrees(ulysses=8, gather=2)),
    ],
)
def test_auto_on_one_document_moves_the_fewest_bytes(heads: tuple[int, int], degree: int, layout: CpDegrees) -> None:
    model = AttentionHeads(query=heads[0], kv=heads[1])
    scheme = AutoContextParallel()
    assert scheme.layout(model, degree, [131072], 131072) == layout
    moved = moved_heads(model, layout, 131072, share_out([131072], 131072, layout.gather)[0].gathered_len)
    assert moved <= moved_heads(model, CpDegrees(ulysses=degree), 131072, 0)


def test_auto_gathers_where_documents_are_short() -> None:
    scheme, llama = AutoContextParallel(), AttentionHeads(query=32, kv=8)
    assert scheme.layout(llama, 8, [1000] * 130, 131072) == CpDegrees(gather=8), "nothing to move at all"
    assert scheme.layout(llama, 8, [100_000, *[1000] * 31], 131072) == CpDegrees(ulysses=8)
    assert scheme.layout(llama, 8, [], 128) == CpDegrees(gather=8), "an empty pack"


@pytest.mark.parametrize("seed", range(10))
def test_auto_chooses_what_it_has_meshes_for(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scheme = AutoContextParallel()
    for _ in range(20):
        kv, per_kv, degree, docs, longest = (int(n) for n in torch.randint(1, 13, (5,), generator=generator))
        heads = AttentionHeads(query=kv * per_kv, kv=kv)
        doc_lens = [int(n) for n in torch.randint(1, longest**4 + 1, (docs,), generator=generator)]
        padded = -(-sum(doc_lens) // (2 * degree)) * 2 * degree
        layouts = scheme.layouts(heads, degree)
        assert len(layouts) <= 2
        assert scheme.layout(heads, degree, doc_lens, padded) in layouts


def mesh_job(layouts: list[CpDegrees]) -> tuple[dict[CpDegrees, tuple[list[int] | None, ...]], int]:
    """Give the ranks of each layout's axes, and the process groups made."""
    before = len(dist.distributed_c10d._world.pg_map)
    meshes = build_cp_meshes(layouts, "cpu", timeout=timedelta(seconds=60))
    ranks_of = {
        degrees: tuple(axis and dist.get_process_group_ranks(axis.get_group()) for axis in (mesh.ulysses, mesh.gather))
        for degrees, mesh in meshes.items()
    }
    timeouts = {
        dist.distributed_c10d._get_pg_default_device and axis.get_group()._get_backend(torch.device("cpu")).options._timeout
        for mesh in meshes.values()
        for axis in (mesh.ulysses, mesh.gather)
        if axis is not None and axis.size() < dist.get_world_size()
    }
    assert timeouts <= {timedelta(seconds=60)}
    return ranks_of, len(dist.distributed_c10d._world.pg_map) - before


def test_ranks_and_number_of_process_groups(ranks: Callable[[int], RankPool]) -> None:
    layouts = [CpDegrees(), CpDegrees(ulysses=2), CpDegrees(gather=2), CpDegrees(ulysses=4), CpDegrees(ulysses=2, gather=2)]
    for rank, (ranks_of, created) in enumerate(ranks(4).run(mesh_job, layouts)):
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert ranks_of == {
            CpDegrees(): (None, None),
            CpDegrees(ulysses=2): (pair, None),
            CpDegrees(gather=2): (None, pair),
            CpDegrees(ulysses=4): ([0, 1, 2, 3], None),
            CpDegrees(ulysses=2, gather=2): (pair, [rank % 2, rank % 2 + 2]),
        }
        assert created == 2, "one for pairs of neighbours, one for pairs across; all four are the world"


def test_two_cp_groups_in_one_world(ranks: Callable[[int], RankPool]) -> None:
    whole = qkv(NUM_TOKENS, 4, 2)
    for degrees in (CpDegrees(ulysses=2), CpDegrees(gather=2)):
        results = ranks(4).run(attend_job, degrees, 4, 2, (64,), False)
        for first in (0, 2):
            torch.testing.assert_close(joined(results[first : first + 2], degrees, (64,))[0], dense(*whole, (64,)).detach())


def test_schemes_by_name_and_their_layouts() -> None:
    heads = AttentionHeads(query=28, kv=4)
    by_name = {name: select_context_parallel(name).layout(heads, 4, [100], 128) for name in ("auto", "ulysses", "all_gather")}
    assert by_name == {"auto": CpDegrees(ulysses=4), "ulysses": CpDegrees(ulysses=4), "all_gather": CpDegrees(gather=4)}
    with pytest.raises(ConfigError, match=r"context_parallel='ring' is not a scheme; choose one of auto, ulysses, all_gather"):
        select_context_parallel("ring")


def test_ulysses_times_all_gather() -> None:
    heads = AttentionHeads(query=28, kv=4)
    scheme: ContextParallel = UlyssesAllGather(ulysses_degree=4)
    assert scheme.layouts(heads, 8) == (CpDegrees(ulysses=4, gather=2),)
    assert scheme.layouts(heads, 2) == (CpDegrees(ulysses=2),)
    with pytest.raises(ConfigError, match=r"cp_degree=6 is not a multiple of ulysses_degree=4; set one to a multiple"):
        scheme.layouts(heads, 6)
    with pytest.raises(ConfigError, match=r"ulysses_degree=0 must be a whole number of at least 1"):
        UlyssesAllGather(ulysses_degree=0)


def test_what_is_said_of_each_group() -> None:
    groups = [PackingGroup(name="short", pack_len=64), PackingGroup(name="long", pack_len=1024, cp_degree=8)]
    heads = AttentionHeads(query=28, kv=4)
    assert describe_layouts(AutoContextParallel(), heads, groups) == [
        "context parallel: group 'long', 28/4 heads: Ulysses over 4 x all-gathered KV over 2"
    ]
    assert describe_layouts(Ulysses(), heads, groups) == [
        "context parallel: group 'long', 28/4 heads: Ulysses over 8, heads filled up to 32/8"
    ]
    assert describe_layouts(AllGatherKV(), heads, groups) == [
        "context parallel: group 'long', 28/4 heads: all-gathered KV over 8"
    ]
