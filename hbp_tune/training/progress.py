"""What a run saves to go on exactly where it stopped."""

import io
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hbp_tune.errors import ResumeError, SaveError
from hbp_tune.parallel.agree import from_all_ranks
from hbp_tune.planning.plans.records import PackingGroup
from hbp_tune.training.disk import describe_room, first_disk_problem, num_bytes
from hbp_tune.training.progress_folder import RECORD, ProgressFolder

T = TypeVar("T")

# A disk that refused so many saves, one after the other, will not take the next.
_MAX_FAILURES_IN_ROW = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """What must not change between a run and its continuation.

    Args:
        world_size: ranks of the run.
        groups: packing groups, as in the plan; their recomputation may change, after running out of memory, say.
        store_fingerprint: of all tokens and targets of the data.
    """

    world_size: int
    groups: tuple[PackingGroup, ...]
    store_fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """The last completed optimizer step.

    Args:
        global_step: optimizer steps of the run.
        epoch: counted from 0.
        epoch_step: optimizer steps of that epoch that are done.
        seed: of the run.
        plan_hash: of that epoch's plan.
        total_steps: of the run, the LR schedule's length.
        epochs: that the run began with, and
        max_steps: likewise: a curriculum goes on by them, also where more are asked for later.
        skipped_steps: of these steps, those that were not applied: their loss or gradient was not finite.
    """

    global_step: int
    epoch: int
    epoch_step: int
    seed: int
    plan_hash: str
    total_steps: int
    epochs: int
    max_steps: int | None = None
    skipped_steps: int = 0


class ProgressSaver:
    """Saves and loads a run's progress below one folder, by all ranks together.

    A save that a disk refuses (full, read-only, over a quota or file size limit) costs the run nothing but that save, until
    it is the third in a row. Ranks speak about a save over a process group of their own, on gloo: what is written in the
    background never comes between the collectives of training.

    Args:
        directory: holds ``step_N`` folders.
        identity: of this run.
        settings: of this run, kept beside its progress.
        keep: newest folders that are kept.
        is_async: copy the state to host memory and write it while training goes on.
        log: what rank 0 says about each save.
    """

    def __init__(
        self,
        directory: Path,
        identity: RunIdentity,
        *,
        settings: Mapping[str, Any],
        keep: int = 1,
        is_async: bool = False,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._folder = ProgressFolder(directory, keep=keep)
        self._identity = identity
        self._settings = dict(settings)
        self._is_async = is_async
        self._log = log
        self._pg = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._pending: Future[str | None] | None = None
        self._failures_in_row = 0

    def save(
        self, position: Position, *, model: nn.Module, optimizer: Optimizer, lr_scheduler: LRScheduler | None = None
    ) -> None:
        """Save model, optimizer, schedule, random state and position, after the last save has ended.

        Asynchronous saves go on in the background: `settle` waits for them.
        """
        self.settle()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        weights: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        files = {f"random_{dist.get_rank()}.pt": _to_bytes(_random_state())}
        if dist.get_rank() == 0:
            files["lr_scheduler.pt"] = _to_bytes(lr_scheduler.state_dict() if lr_scheduler else None)
            record = {"position": asdict(position), "identity": _plain(self._identity), "settings": self._settings}
            files[RECORD] = json.dumps(record, indent=2).encode()
        if self._is_async:
            weights = BlockingAsyncStager().stage(weights)  # the same in torch 2.11 to 2.13, which call it experimental
            self._pending = _in_background(partial(self._write, position.global_step, weights, files))
        else:
            self._pending = Future()
            self._pending.set_result(self._write(position.global_step, weights, files))
            self.settle()

    def settle(self, *, is_last: bool = False) -> None:
        """Wait until the last save has ended.

        Args:
            is_last: the run ends here, so that there will be no better save.

        Raises:
            SaveError: it failed, and was the last or the third in a row to do so.
        """
        if self._pending is None:
            return
        problem, self._pending = self._pending.result(), None
        self._failures_in_row = self._failures_in_row + 1 if problem else 0
        if problem and (is_last or self._failures_in_row == _MAX_FAILURES_IN_ROW):
            raise SaveError(
                f"{problem}; {'the run ends without it' if is_last else f'it is failure {_MAX_FAILURES_IN_ROW} in a row'}. "
                f"Free space, or change output_dir's disk, then resume with resume_from_checkpoint=True"
            )

    def newest(self) -> Path | None:
        """Give the newest saved progress, if any."""
        finished = self._folder.finished()
        return finished[-1] if finished else None

    def latest(self, *, is_required: bool = True) -> Position | None:
        """Give the position of the newest saved progress, if any, checked against this run.

        Raises:
            ResumeError: there is none though it is required, or it belongs to other data, groups or another world size.
        """
        folder = self.newest()
        if folder is None and not is_required:
            return None
        if folder is None:
            raise ResumeError(
                f"resume_from_checkpoint=True, but there is no saved progress in {self._folder.directory}; "
                f"check output_dir, or set resume_from_checkpoint to auto or False to start from the checkpointer's weights"
            )
        record = json.loads((folder / RECORD).read_text())
        self._check_identity(record["identity"], folder)
        return Position(**record["position"])

    def saved_settings(self, position: Position) -> dict[str, Any]:
        """Give the settings of the run that saved its progress at ``position``."""
        record = json.loads((self._folder.directory / f"step_{position.global_step}" / RECORD).read_text())
        settings: dict[str, Any] = record["settings"]
        return settings

    def load(
        self, position: Position, *, model: nn.Module, optimizer: Optimizer, lr_scheduler: LRScheduler | None = None
    ) -> None:
        """Load what was saved at ``position`` in place, on every rank."""
        folder = self._folder.directory / f"step_{position.global_step}"
        model_state, optimizer_state = get_state_dict(model, optimizer)
        load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(folder / "weights"))
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        _set_random_state(torch.load(folder / f"random_{dist.get_rank()}.pt", weights_only=True))
        if lr_scheduler is not None and (state := torch.load(folder / "lr_scheduler.pt", weights_only=True)):
            lr_scheduler.load_state_dict(state)

    def _write(self, step: int, weights: dict[str, Any], files: dict[str, bytes]) -> str | None:
        """Write one save by all ranks together; give what a disk had against it, the same on every rank."""
        is_rank_zero = dist.get_rank() == 0
        aside = self._folder.aside(step)

        def write_own_part() -> None:
            save(weights, checkpoint_id=str(aside / "weights"), process_group=self._pg)
            for name, content in files.items():
                (aside / name).write_bytes(content)

        def on_rank_zero(work: Callable[[int], object]) -> Callable[[], object]:
            return partial(work, step) if is_rank_zero else lambda: None

        for part in (on_rank_zero(self._folder.begin), write_own_part, on_rank_zero(self._folder.publish)):
            if reason := first_disk_problem(part, self._pg):
                break
        else:
            self._log(f"Progress saved in {self._folder.directory / f'step_{step}'}")
            return None
        needed = from_all_ranks(num_bytes(weights), self._pg)
        if is_rank_zero:
            self._folder.discard_unfinished()
        newest = self.newest()
        problem = (
            f"progress of step {step} could not be saved: {reason} ({describe_room(self._folder.directory, sum(needed))}); "
            f"the newest progress is {newest.name if newest else 'none'}"
        )
        problem = from_all_ranks(problem, self._pg)[0]  # free room changes from one look to the next: one rank speaks for all
        self._log(problem)
        return problem

    def _check_identity(self, saved: dict[str, Any], folder: Path) -> None:
        """Refuse progress of another run.

        Raises:
            ResumeError: names what changed, both values and the way out.
        """
        ways_out = {
            "world_size": "start as many ranks as before, or start anew from the exported weights",
            "groups": "set the groups back, or start anew from the exported weights",
            "store_fingerprint": "the data set, its tokenizer or template changed: put them back, or start anew from the "
            "exported weights",
        }
        for name, current in _plain(self._identity).items():
            if saved[name] != current:
                raise ResumeError(f"cannot resume from {folder}: {name} was {saved[name]} and is now {current}; {ways_out[name]}")


def check_plan_hash(position: Position, plan_hash: str) -> None:
    """Refuse to go on in the middle of an epoch that is now planned otherwise.

    Raises:
        ResumeError: the planner's or curriculum's settings changed.
    """
    if position.plan_hash != plan_hash:
        raise ResumeError(
            f"cannot resume at step {position.epoch_step} of epoch {position.epoch}: its plan was {position.plan_hash[:12]} and "
            f"is now {plan_hash[:12]}; set planner and curriculum back, or start anew from the exported weights"
        )


def _plain(identity: RunIdentity) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(identity)))
    for group in plain["groups"]:
        del group["ac_layers"], group["ac_mode"]
    return plain


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _to_bytes(value: object) -> bytes:
    """Serialise at once: what training changes later is not saved, and writing plain bytes fails with plain errors."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _in_background(work: Callable[[], T]) -> "Future[T]":
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    # A daemon, so that a run which ends by an error does not wait for it.
    threading.Thread(target=run, name="save", daemon=True).start()
    return future
