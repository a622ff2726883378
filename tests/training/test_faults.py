"""What a step's faults are told as, in one process; `tests/recipes/test_faults.py` has them happen on ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from hbp_tune.components import BalancePlanner, EpochPlan, PackingGroup
from hbp_tune.components.planning.errors import NonFiniteError
from hbp_tune.components.training.disk import disk_problem, num_bytes
from hbp_tune.components.training.faults import StepGuard, StepOutcome, next_memory_setting
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


@pytest.mark.parametrize(
    ("loss", "grad_norm", "is_finite"),
    [(1.0, 2.0, True), (float("nan"), 2.0, False), (1.0, float("inf"), False), (-float("inf"), float("nan"), False)],
)
def test_a_step_counts_if_loss_and_gradient_norm_are_finite(loss: float, grad_norm: float, is_finite: bool) -> None:
    assert StepOutcome(loss=loss, grad_norm=grad_norm, must_stop=False).is_finite is is_finite


def reduce_job(losses: list[list[float]], asked: list[bool]) -> StepOutcome:
    rank = torch.distributed.get_rank()
    guard = StepGuard(torch.device("cpu"))
    for step_losses in ([7.0], losses[rank]):
        guard.start_step()
        for loss in step_losses:
            guard.add(torch.tensor(loss, requires_grad=True))
    return guard.reduce(torch.tensor(0.5), is_asked_to_stop=asked[rank])


@pytest.mark.parametrize("asked", [[False, False], [False, True], [True, True]])
def test_ranks_agree_on_the_sum_and_on_stopping(ranks: Callable[[int], RankPool], asked: list[bool]) -> None:
    outcomes = ranks(2).run(reduce_job, [[1.0, 2.0], [4.0]], asked)
    assert outcomes == [StepOutcome(loss=7.0, grad_norm=0.5, must_stop=any(asked))] * 2


def test_a_loss_that_is_not_finite_does_not_hide_a_request_to_stop(ranks: Callable[[int], RankPool]) -> None:
    for outcome in ranks(2).run(reduce_job, [[float("nan")], [4.0]], [False, True]):
        assert not outcome.is_finite
        assert outcome.must_stop


def plan_two_ranks() -> EpochPlan:
    lengths = np.full(24, 8, dtype=np.int32)
    groups = [PackingGroup(name="all", pack_len=8)]
    return BalancePlanner(tokens_per_step=32).plan(lengths, lengths - 1, groups, world_size=2, seed=0)


def skip_job(bad_micro_steps: list[list[int]]) -> str:
    """Skip step 1, where the given micro-steps of each rank have a loss that is not finite; give the error."""
    plan, rank = plan_two_ranks(), torch.distributed.get_rank()
    guard = StepGuard(torch.device("cpu"), max_nonfinite_steps=0)
    for micro_step in range(len(plan.indices_for_rank(rank, first_step=1, last_step=2))):
        guard.add(torch.tensor(float("nan") if micro_step in bad_micro_steps[rank] else 1.0))
    with pytest.raises(NonFiniteError) as raised:
        guard.skip(StepOutcome(loss=float("nan"), grad_norm=1.0, must_stop=False), plan, 1, np.repeat([0, 1], [10, 14]))
    return str(raised.value)


def test_samples_are_named_by_id_data_set_and_row_on_all_ranks(ranks: Callable[[int], RankPool]) -> None:
    plan = plan_two_ranks()
    mine = plan.indices_for_rank(1, first_step=1, last_step=2)
    sample = int(plan.pack(int(mine[1]), 1).sample_ids[0])
    row = f"data set 0, row {sample}" if sample < 10 else f"data set 1, row {sample - 10}"
    messages = ranks(2).run(skip_job, [[], [1]])
    assert messages[0] == messages[1]
    assert f"the samples of 1 packs with a loss that is not finite are {sample} ({row}). Look at these rows" in messages[0]


def test_without_a_bad_pack_all_samples_of_the_step_are_named(ranks: Callable[[int], RankPool]) -> None:
    plan = plan_two_ranks()
    packs = np.flatnonzero(plan.pack_step == 1)
    message = ranks(2).run(skip_job, [[], []])[0]
    assert "the samples of the step (each pack's loss is finite) are" in message
    assert message.count("data set") == len(packs) == 4


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
