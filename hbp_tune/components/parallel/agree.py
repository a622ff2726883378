"""What one rank computes and all ranks need."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


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
