"""What a run saves to go on exactly where it stopped: written aside, synced, renamed; only renamed folders count."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hbp_tune.components.planning.errors import ResumeError
from hbp_tune.components.planning.records import PackingGroup

_RECORD = "progress.json"


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
    """

    global_step: int
    epoch: int
    epoch_step: int
    seed: int
    plan_hash: str
    total_steps: int


class ProgressSaver:
    """Saves and loads a run's progress below one folder, by all ranks together.

    Args:
        directory: holds ``step_N`` folders.
        identity: of this run.
        keep: newest folders that are kept.
    """

    def __init__(self, directory: Path, identity: RunIdentity, *, keep: int = 1) -> None:
        self._directory = directory
        self._identity = identity
        self._keep = keep

    def save(
        self, position: Position, *, model: nn.Module, optimizer: Optimizer, lr_scheduler: LRScheduler | None = None
    ) -> Path:
        """Save model, optimizer, schedule, random state and position; give the finished folder."""
        final = self._directory / f"step_{position.global_step}"
        aside = final.with_suffix(".tmp")
        is_rank_zero = dist.get_rank() == 0
        if is_rank_zero:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(aside / "weights"))
        torch.save(_random_state(), aside / f"random_{dist.get_rank()}.pt")
        if is_rank_zero:
            torch.save(lr_scheduler.state_dict() if lr_scheduler else None, aside / "lr_scheduler.pt")
            record = {"position": asdict(position), "identity": _plain(self._identity)}
            (aside / _RECORD).write_text(json.dumps(record, indent=2))
        dist.barrier()  # every rank's files are written
        if is_rank_zero:
            _sync_folder(aside)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in self._finished()[: -self._keep]:
                shutil.rmtree(old)
        dist.barrier()  # no rank goes on, and maybe dies, before the new folder counts
        return final

    def latest(self) -> Position:
        """Give the position of the newest saved progress, checked against this run.

        Raises:
            ResumeError: there is none, or it belongs to other data, groups or another world size.
        """
        finished = self._finished()
        if not finished:
            raise ResumeError(
                f"resume_from_checkpoint=True, but there is no saved progress in {self._directory}; "
                f"check output_dir, or set resume_from_checkpoint=False to start from the checkpointer's weights"
            )
        record = json.loads((finished[-1] / _RECORD).read_text())
        self._check_identity(record["identity"], finished[-1])
        return Position(**record["position"])

    def load(
        self, position: Position, *, model: nn.Module, optimizer: Optimizer, lr_scheduler: LRScheduler | None = None
    ) -> None:
        """Load what was saved at ``position`` in place, on every rank."""
        folder = self._directory / f"step_{position.global_step}"
        model_state, optimizer_state = get_state_dict(model, optimizer)
        load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(folder / "weights"))
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        _set_random_state(torch.load(folder / f"random_{dist.get_rank()}.pt", weights_only=True))
        if lr_scheduler is not None and (state := torch.load(folder / "lr_scheduler.pt", weights_only=True)):
            lr_scheduler.load_state_dict(state)

    def _finished(self) -> list[Path]:
        """Give the finished folders, oldest first; unfinished ones end in .tmp."""
        folders = [path for path in self._directory.glob("step_*") if path.suffix != ".tmp" and (path / _RECORD).exists()]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))

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


def _sync_folder(folder: Path) -> None:
    """Force every file below to disk, so that a rename never names half-written content."""
    paths: Sequence[Path] = [*folder.rglob("*"), folder]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
