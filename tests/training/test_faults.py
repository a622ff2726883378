"""What a step's faults are told as, in one process; `tests/recipes/test_faults.py` has them happen on ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.api import CheckpointException

from hbp_tune.errors import NonFiniteError
from hbp_tune.planning import BalancePlanner, EpochPlan, PackingGroup
from hbp_tune.reporting import RowPlace
from hbp_tune.training.disk import disk_problem, num_bytes
from hbp_tune.training.faults import StepGuard, next_memory_setting
from tests.ranks import RankPool

ADVICE = [
    ({"ac_layers": 0}, 1, True, "ac_layers=8 in this group, up to 32"),
    ({"ac_layers": 31}, 1, True, "ac_layers=32 in this group, up to 32"),
    ({"ac_layers": 32}, 8, True, "cp_degree=2 in this group"),
    ({"ac_layers": 32, "cp_degree": 8}, 8, True, "ac_mode=offload in this group"),
    ({"ac_layers": 32, "cp_degree": 8, "pack_len": 1040}, 16, True, "ac_mode=offload in this group"),
    ({"ac_layers": 32, "cp_degree": 8, "ac_mode": "offload"}, 8, True, "a shorter pack_len in this group, or fsdp_cpu_offload"),
    ({"ac_layers": 32}, 1, False, "a shorter pack_len in this group"),
]


@pytest.mark.parametrize(("settings", "world_size", "is_cuda", "advice"), ADVICE)
def test_the_next_setting_that_saves_memory(settings: dict[str, Any], world_size: int, is_cuda: bool, advice: str) -> None:
    group = PackingGroup(name="long", **({"pack_len": 1024} | settings))
    assert next_memory_setting(group, world_size=world_size, num_layers=32, is_cuda=is_cuda).startswith(advice)


def test_the_loss_of_a_step_is_that_of_its_own_packs() -> None:
    guard = StepGuard()
    for step_losses in ([7.0], [1.0, 2.0]):
        guard.start_step()
        for loss in step_losses:
            guard.add(torch.tensor(loss, requires_grad=True))
    assert guard.loss_sum().item() == 3.0
    assert not guard.loss_sum().requires_grad


def plan_two_ranks() -> EpochPlan:
    lengths = np.full(24, 8, dtype=np.int32)
    groups = [PackingGroup(name="all", pack_len=8)]
    return BalancePlanner(tokens_per_step=32).plan(lengths, lengths - 1, groups, world_size=2, seed=0)


def places(sample_ids: NDArray[np.int32]) -> list[RowPlace]:
    return [RowPlace(dataset=f"set {i // 10}", row=i % 10) for i in sample_ids.tolist()]


def skip_job(bad_micro_steps: list[list[int]]) -> str:
    """Skip step 1, where the given micro-steps of each rank have a loss that is not finite; give the error."""
    plan, rank = plan_two_ranks(), torch.distributed.get_rank()
    guard = StepGuard(max_nonfinite_steps=0)
    for micro_step in range(len(plan.indices_for_rank(rank, first_step=1, last_step=2))):
        guard.add(torch.tensor(float("nan") if micro_step in bad_micro_steps[rank] else 1.0))
    with pytest.raises(NonFiniteError) as raised:
        guard.skip(float("nan"), 1.0, plan, 1, places)
    return str(raised.value)


def test_samples_are_named_by_id_and_place_on_all_ranks(ranks: Callable[[int], RankPool]) -> None:
    plan = plan_two_ranks()
    mine = plan.indices_for_rank(1, first_step=1, last_step=2)
    sample = int(plan.pack(int(mine[1]), 1).sample_ids[0])
    named = f"{sample} (row {sample % 10} of set {sample // 10})"
    messages = ranks(2).run(skip_job, [[], [1]])
    assert messages[0] == messages[1]
    assert f"the samples of 1 packs with a loss that is not finite are {named}. Look at these rows" in messages[0]


def test_without_a_bad_pack_all_samples_of_the_step_are_named(ranks: Callable[[int], RankPool]) -> None:
    plan = plan_two_ranks()
    packs = np.flatnonzero(plan.pack_step == 1)
    message = ranks(2).run(skip_job, [[], []])[0]
    assert "the samples of the step (each pack's loss is finite) are" in message
    assert message.count(" of set ") == len(packs) == 4


def test_bytes_of_nested_tensors_are_counted() -> None:
    assert num_bytes({"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.int64), {"c": torch.zeros(())}], "d": 1.5}) == 32


def test_only_what_a_disk_refused_is_a_disk_problem() -> None:
    full, other = OSError(28, "No space left on device"), KeyError("x")
    assert disk_problem(full) == "[Errno 28] No space left on device"
    assert disk_problem(other) is None
    assert disk_problem(ConnectionResetError(104, "Connection reset by peer")) is None
    assert disk_problem(CheckpointException("", {1: (full, None)})) == "[Errno 28] No space left on device"
    assert disk_problem(CheckpointException("", {0: (full, None), 1: (other, None)})) is None
    torch_writer = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert str(disk_problem(torch_writer)).startswith("fewer bytes were written than asked for: the disk is full")
