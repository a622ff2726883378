from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from hbp_tune.components import ConfigError, PackingGroup, Ulysses, build_cp_meshes
from hbp_tune.components.parallel.attention import sdpa_per_document
from tests.ranks import RankPool

NUM_TOKENS, HEAD_DIM = 48, 8
# Documents that end at, start at and cross the borders of 2 and 4 shards, and documents of one token.
DOC_LENS = {"one": (48,), "borders": (12, 12, 24), "crossing": (1, 22, 3, 1, 20, 1), "single tokens": (1,) * 12 + (36,)}


def inputs(heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(NUM_TOKENS, h, HEAD_DIM, generator=generator, dtype=torch.float64).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def cumulative(doc_lens: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *doc_lens]).cumsum(0).to(torch.int32)


def loss_of(output: Tensor, rows: slice) -> Tensor:
    weights = torch.randn(NUM_TOKENS, *output.shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (output * weights[rows]).sum()


def ulysses_job(cp_degree: int, heads: int, kv_heads: int, doc_lens: tuple[int, ...]) -> tuple[list[Tensor], dict[str, int]]:
    """Give this rank's rows of the output and of the inputs' gradients, and the collectives of the forward."""
    group = PackingGroup(name="all", pack_len=NUM_TOKENS, cp_degree=cp_degree)
    mesh = build_cp_meshes([group], "cpu", timeout=timedelta(seconds=60))[cp_degree]
    assert mesh is not None
    local_len = NUM_TOKENS // cp_degree
    rows = slice(mesh.get_local_rank() * local_len, (mesh.get_local_rank() + 1) * local_len)
    local = [x.detach()[rows].requires_grad_() for x in inputs(heads, kv_heads)]
    with CommDebugMode() as collectives:
        output = Ulysses()(*local, mesh=mesh, attention=sdpa_per_document, cu_seqlens=cumulative(doc_lens), doc_lens=doc_lens)
    counts = {str(name): count for name, count in collectives.get_comm_counts().items()}
    return [output.detach(), *torch.autograd.grad(loss_of(output, rows), local)], counts


@pytest.mark.parametrize("doc_lens", DOC_LENS.values(), ids=DOC_LENS)
@pytest.mark.parametrize(("cp_degree", "heads", "kv_heads"), [(2, 4, 4), (2, 4, 2), (2, 4, 1), (4, 4, 2), (4, 8, 1), (4, 12, 4)])
def test_ulysses_equals_one_process(
    ranks: Callable[[int], RankPool], cp_degree: int, heads: int, kv_heads: int, doc_lens: tuple[int, ...]
) -> None:
    whole = inputs(heads, kv_heads)
    output = sdpa_per_document(*whole, cumulative(doc_lens), doc_lens)
    want = [output.detach(), *torch.autograd.grad(loss_of(output, slice(None)), whole)]
    results = ranks(cp_degree).run(ulysses_job, cp_degree, heads, kv_heads, doc_lens)
    for part, reference in enumerate(want):
        torch.testing.assert_close(torch.cat([tensors[part] for tensors, _ in results]), reference)


def test_one_exchange_before_attention_and_one_after(ranks: Callable[[int], RankPool]) -> None:
    for _, counts in ranks(2).run(ulysses_job, 2, 4, 2, (48,)):
        assert sum(counts.values()) == 2, counts


def test_two_ranks_form_two_subgroups_of_four(ranks: Callable[[int], RankPool]) -> None:
    whole = inputs(4, 2)
    output = sdpa_per_document(*whole, cumulative((48,)), (48,))
    results = ranks(4).run(ulysses_job, 2, 4, 2, (48,))
    for first in (0, 2):
        torch.testing.assert_close(torch.cat([tensors[0] for tensors, _ in results[first : first + 2]]), output.detach())


def mesh_sizes_job(groups: list[PackingGroup]) -> dict[int, int | None]:
    meshes = build_cp_meshes(groups, "cpu")
    return {degree: mesh and mesh.size() for degree, mesh in meshes.items()}


def test_one_mesh_for_each_degree(ranks: Callable[[int], RankPool]) -> None:
    groups = [PackingGroup(name=str(i), pack_len=64 * (i + 1), cp_degree=cp) for i, cp in enumerate((1, 2, 2, 4))]
    assert ranks(4).run(mesh_sizes_job, groups) == [{1: None, 2: 2, 4: 4}] * 4


def test_heads_that_do_not_divide_are_refused_with_the_degrees_that_work() -> None:
    groups = [PackingGroup(name="short", pack_len=64), PackingGroup(name="long", pack_len=1024, cp_degree=8)]
    with pytest.raises(ConfigError, match=r"group 'long': cp_degree=8 .* 28 query heads.*: 1, 2, 4, 7, 14, 28"):
        Ulysses().check_heads(groups, num_heads=28, num_kv_heads=4)
    Ulysses().check_heads(groups, num_heads=32, num_kv_heads=2)
