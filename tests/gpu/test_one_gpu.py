"""Ranks that share one GPU train as one process does: the CUDA path of context parallelism, without several GPUs.

Process groups are staged ones (`tests.staged_group`), so what is not tried here is NCCL itself. The rest is what ranks on
several GPUs run: FSDP2 with bf16 compute and fp32 weights, CP degrees that change from step to step, the variable-length kernel,
DTensor's all-to-all for CUDA meshes, all-gathered keys, layers that recompute.

On the host the same jobs run with the CUDA all-to-all forced (`tests.parallel.collectives`), and equal gloo's own.
Those were run on torch 2.13 and 2.11, these on an H200 with torch 2.11: `pytest -m gpu tests/gpu`.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from tests.parallel.collectives import cuda_all_to_all
from tests.parallel.test_equality import LONG_PACKS, Case, assert_close_in_bf16, train_job
from tests.ranks import RankError, RankPool
from tests.staged_group import CALLS

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")])
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


def train_staged_job(case: Case, steps: int, device: str) -> tuple[list[tuple[float, dict[str, Tensor]]], Counter[str]]:
    """Train, and count the collectives."""
    before = CALLS.copy()
    with cuda_all_to_all() if device == "cpu" else nullcontext():
        return train_job(case, steps, device), CALLS - before


def collectives_job(device: str) -> dict[str, Any]:
    """Give what every collective gave this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.arange(4, device=device) + 10 * rank
    own = {name: mine.clone() for name in ("sum", "broadcast")}
    dist.all_reduce(own["sum"])
    dist.broadcast(own["broadcast"], src=1)
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine)
    traded = torch.empty_like(mine)
    dist.all_to_all_single(traded, mine)
    mesh = init_device_mesh(device, (size,))
    single = DTensor.from_local(mine.bfloat16(), mesh, [Shard(0)]).full_tensor()
    mean = DTensor.from_local(mine.float(), mesh, [Partial("avg")]).redistribute(mesh, [Shard(0)]).to_local()
    objects = [{"rank": rank}]
    dist.broadcast_object_list(objects, src=1)
    alone, _ = dist.new_subgroups_by_enumeration([[0], [1]])
    of_one = mine.clone()
    dist.all_reduce(of_one, group=alone)
    dist.barrier()
    tensors = {**own, "gathered": torch.cat(gathered), "single": single, "mean": mean, "traded": traded, "alone": of_one}
    assert {tensor.device.type for tensor in tensors.values()} == {device}
    return {"objects": objects, **{name: tensor.tolist() for name, tensor in tensors.items()}}


def largest_job() -> None:
    dist.all_reduce(torch.zeros(1), op=dist.ReduceOp.MAX)


def unequal_parts_job() -> None:
    dist.all_to_all_single(torch.zeros(3), torch.zeros(3), [1, 2], [1, 2])


@DEVICES
def test_collectives_by_hand(staged_ranks: Callable[[int], RankPool], device: str) -> None:
    results = staged_ranks(2).run(collectives_job, device)
    both = {
        "sum": [10, 12, 14, 16],
        "broadcast": [10, 11, 12, 13],
        "gathered": [0, 1, 2, 3, 10, 11, 12, 13],
        "single": [0, 1, 2, 3, 10, 11, 12, 13],
        "objects": [{"rank": 1}],
    }
    assert results[0] == {**both, "mean": [5, 6], "traded": [0, 1, 10, 11], "alone": [0, 1, 2, 3]}
    assert results[1] == {**both, "mean": [7, 8], "traded": [2, 3, 12, 13], "alone": [10, 11, 12, 13]}


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (largest_job, r"RedOpType.MAX is neither SUM nor AVG"),
        (unequal_parts_job, r"splits \[1, 2\] to \[1, 2\]: only equal parts"),
    ],
)
def test_what_is_not_staged_is_refused(staged_ranks: Callable[[int], RankPool], job: Callable[[], None], message: str) -> None:
    with pytest.raises(RankError, match=message):
        staged_ranks(2).run(job)


CASES = [
    Case(world_size=2, scheme="ulysses", ac_mode="selective", kv_heads=1, dtype=torch.float32),
    Case(world_size=2, scheme="all_gather", ac_mode="full", micro_steps=3, dtype=torch.float32),
    Case(world_size=4, scheme="ulysses", ac_mode="full", dtype=torch.float32),
    Case(world_size=4, scheme="both", ac_mode="selective", dtype=torch.float32),
]


def name_of(case: Case) -> str:
    return f"{case.world_size} ranks-{case.scheme}-{case.ac_mode}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_staged_ranks_equal_gloo(staged_ranks: Callable[[int], RankPool], ranks: Callable[[int], RankPool], case: Case) -> None:
    """Sums of the same addends in another order are all that may differ."""
    got, _ = staged_ranks(case.world_size).run(train_staged_job, case, 3, "cpu")[0]
    for (loss, grads), (want_loss, want_grads) in zip(got, ranks(case.world_size).run(train_job, case, 3)[0], strict=True):
        assert loss == pytest.approx(want_loss, rel=1e-6)
        for name, want in want_grads.items():
            assert (grads[name] - want).norm() <= 1e-6 * want.norm(), name


BF16 = {"dtype": torch.float32, "compute_dtype": torch.bfloat16}


@DEVICES
def test_selective_recomputation_repeats_no_all_to_all(staged_ranks: Callable[[int], RankPool], device: str) -> None:
    """Two layers trade heads twice forward and twice backward; one of them recomputes."""
    num_calls = {}
    for ac_mode in ("off", "full", "selective"):
        case = Case(world_size=2, ac_mode=ac_mode, **BF16)
        staged_ranks(2).run(train_staged_job, case, 0, device)  # connects the ranks by an all-to-all
        num_calls[ac_mode] = staged_ranks(2).run(train_staged_job, case, 2, device)[0][1]["all_to_all"]
    assert num_calls == {"off": 8, "full": 10, "selective": 8}


def assert_equal_one_process(pool: RankPool, case: Case, device: str) -> None:
    """Compare with dense attention in fp32, within bf16's tolerance; all-to-alls run where heads are traded."""
    pool.run(train_staged_job, case, 0, device)  # connects the ranks by an all-to-all
    results, calls = pool.run(train_staged_job, case, 6, device)[0]
    assert_close_in_bf16(case, results)
    assert (calls["all_to_all"] > 0) == (case.scheme != "all_gather")


@pytest.mark.parametrize("scheme", ["all_gather", "both"])
def test_bf16_ranks_on_the_host_equal_one_process(staged_ranks: Callable[[int], RankPool], scheme: str) -> None:
    """What the next test does, where there is no GPU; errors seen: 3e-5 of the loss, 0.6% of the gradient."""
    assert_equal_one_process(staged_ranks(4), Case(scheme=scheme, ac_mode="selective", **BF16), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("ac_mode", ["off", "full", "selective", "offload"])
@pytest.mark.parametrize("scheme", ["ulysses", "all_gather", "both", "auto"])
def test_bf16_ranks_on_one_gpu_equal_one_process(staged_ranks: Callable[[int], RankPool], scheme: str, ac_mode: str) -> None:
    """Four ranks with the variable-length kernel and three micro-steps a step."""
    case = Case(scheme=scheme, ac_mode=ac_mode, micro_steps=3, pool=LONG_PACKS, **BF16)
    assert_equal_one_process(staged_ranks(4), case, "cuda")
