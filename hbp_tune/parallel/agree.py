"""What one rank computes and all ranks need, and what every rank does at its own pace."""

import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

# Private, and nowhere else: the store that the process group was joined by. A collective has the process group's time-out, and
# on CUDA one in flight; keys in the store have neither. Tried with torch 2.13, for file:// and env://; since 2.0 by this name.
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from hbp_tune.errors import ConfigError

T = TypeVar("T")
_POLL_S = 0.1
# How long a failed rank waits for the others to learn why, before it ends and its launcher ends them.
_GRACE_S = 10.0


def from_rank_zero(make: Callable[[], T]) -> T:
    """Call ``make`` on rank 0 and give its result to every rank; an error there is raised on every rank.

    Collective: every rank must call it. The result travels pickled, so only plain and host data should.
    """
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = make()
        except Exception as error:
            result[1] = error
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    value: T = result[0]
    return value


def from_all_ranks(value: T, pg: dist.ProcessGroup | None = None) -> list[T]:
    """Give every rank's value, by rank; collective over the process group, the default one where left out."""
    values: list[Any] = [None] * dist.get_world_size(pg)
    dist.all_gather_object(values, value, group=pg)
    return values


def together(work: Callable[["Watch"], T], *, name: str, timeout_s: float, timeout_key: str = "timeout_s") -> T:
    """Let every rank work at its own pace, then wait until all have done so; an error of one is soon raised on all.

    Every rank must call it, but it is not a collective: no time-out of a process group runs meanwhile.

    Args:
        work: called with a `Watch`, to be called in turn at least every few seconds of work that takes long.
        name: of the work, for errors.
        timeout_s: since the last sign of progress of any rank.
        timeout_key: the configuration key of the time-out, for the error.

    Returns:
        What this rank's work gave.
    """
    watch = Watch(name, timeout_s, timeout_key)
    try:
        result = work(watch)
        watch.wait_for_all()
    except Exception as error:
        raise watch.fail(error) from error
    return result


class Watch:
    """A rank's view of what all ranks do together; see `together`."""

    def __init__(self, name: str, timeout_s: float, timeout_key: str) -> None:
        self._name, self._timeout_s, self._timeout_key = name, timeout_s, timeout_key
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        store = _get_default_store()
        # The calls of a name are counted by rank, as every rank makes the same ones: a later call has keys of its own.
        call = store.add(f"hbp_tune/{name}/calls/{self._rank}", 1)
        self._store = PrefixStore(f"hbp_tune/{name}/{call}", store)
        self._progress = 0
        self._signs, self._last_sign_s = 0, time.monotonic()
        self._next_look_s = 0.0

    def __call__(self, progress: int = 0) -> None:
        """Tell the others of progress, any number that changes with it, and raise the first error of any rank."""
        if time.monotonic() < self._next_look_s:
            return
        if progress != self._progress:
            self._progress = progress
            self._store.add("signs", 1)
        self._look()

    def wait_for_all(self) -> None:
        """Wait until every rank has come here, or raise the first error of any rank."""
        self._store.set(self._done(self._rank), "")
        self._store.add("signs", 1)
        num_done = self._store.add("num_done", 1)
        while num_done < self._world_size:
            self._look()
            time.sleep(_POLL_S)
            num_done = self._store.add("num_done", 0)

    def fail(self, error: Exception) -> Exception:
        """Tell all ranks of an error, give them time to hear of it, and give the first error of any of them."""
        if self._store.add("num_errors", 1) == 1:
            self._store.set("error", _pickled(error).hex())
        first = self._first_error()
        limit = time.monotonic() + _GRACE_S
        self._store.add("num_failed", 1)
        while self._store.add("num_failed", 0) < self._world_size and time.monotonic() < limit:
            time.sleep(_POLL_S)
        return first

    def _look(self) -> None:
        now = time.monotonic()
        self._next_look_s = now + _POLL_S
        if self._store.check(["error"]):
            raise self._first_error()
        signs = self._store.add("signs", 0)
        if signs != self._signs:
            self._signs, self._last_sign_s = signs, now
        elif now - self._last_sign_s > self._timeout_s:
            raise ConfigError(
                f"{self._name}: no rank has made progress for {self._timeout_key}={self._timeout_s:g}, and ranks "
                f"{self._missing()} are not done; look for their errors, or raise {self._timeout_key} if one step takes longer"
            )

    def _first_error(self) -> Exception:
        error: Exception = pickle.loads(bytes.fromhex(self._store.get("error").decode()))
        return error

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._world_size) if not self._store.check([self._done(rank)])]

    @staticmethod
    def _done(rank: int) -> str:
        return f"done/{rank}"


def _pickled(error: Exception) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # of a class whose arguments are not its message, or that another process does not know
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data
