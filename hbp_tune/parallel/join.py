"""Joining the process group, also when torchrun starts all ranks again."""

import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch does not list them

_POLL_S = 0.02
_STORE_TIMEOUT = timedelta(minutes=10)


def join_process_group(backend: str, environment: Mapping[str, str], timeout: timedelta | None = None) -> None:
    """Make the default process group by what torchrun put into the environment; every rank must call it.

    torchrun hands the same store to every start of its ranks (torch 2.13, both kinds of rendezvous): ranks that start again would
    read the addresses of those that are gone, and hang. So the ranks of each start agree on keys of their own.

    Args:
        backend: of the process group.
        environment: with MASTER_ADDR, RANK and what else torchrun sets.
        timeout: of collectives; torch's own by default.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=_STORE_TIMEOUT)
    start = name_of_start(store, rank, world_size)
    dist.init_process_group(backend, store=PrefixStore(start, store), rank=rank, world_size=world_size, timeout=timeout)


def name_of_start(store: Store, rank: int, world_size: int) -> str:
    """Agree with the other ranks of this start on a name that no other start has; every rank must call it.

    Numbers of restarts will not do: after a failure on one node, torchrun counts it on that node alone. So each rank asks by a
    name of its own, and rank 0 answers whatever was asked, by ranks that are gone too, until all of its own start have heard.

    Args:
        store: that all starts share.
        rank: of this process.
        world_size: of the start.
    """
    prefix = "hbp_tune/start"
    mine = uuid.uuid4().hex
    store.set(f"{prefix}/asked/{rank}", mine)
    if rank == 0:
        while store.add(f"{prefix}/heard/{mine}", 0) < world_size - 1:
            for other in range(1, world_size):
                if store.check([f"{prefix}/asked/{other}"]):
                    store.set(f"{prefix}/answer/{store.get(f'{prefix}/asked/{other}').decode()}", mine)
            time.sleep(_POLL_S)
        return mine
    start: str = store.get(f"{prefix}/answer/{mine}").decode()  # waits for it
    store.add(f"{prefix}/heard/{start}", 1)
    return start
