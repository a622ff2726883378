"""What a resumed run takes from its configuration rather than from what was saved: the optimizer's settings and the schedule."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def optimizer_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Give the settings of each parameter group, such as ``weight_decay``; before saved state is loaded over them."""
    return [{key: _copied(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def take_up_settings(optimizer: Optimizer, lr_scheduler: LRScheduler | None, configured: Sequence[Mapping[str, Any]]) -> None:
    """Put the settings of now in the place of the saved ones, and the schedule's learning rate where the run is.

    With unchanged settings nothing changes, to the last bit.

    Args:
        optimizer: after its saved state was loaded.
        lr_scheduler: likewise; of steps already done it knows from the saved run, of those to come from the configuration.
        configured: as `optimizer_settings` gave it.
    """
    for group, wanted in zip(optimizer.param_groups, configured, strict=True):
        group.update({key: _copied(value) for key, value in wanted.items() if key != "lr"})
        if lr_scheduler is None:
            _set_lr(group, wanted["lr"])
    if lr_scheduler is None:
        return
    lr_scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    if isinstance(lr_scheduler, LambdaLR):  # as torchtune's are; others keep the saved rate until their next step
        for group, base_lr, scale in zip(optimizer.param_groups, lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True):
            _set_lr(group, base_lr * scale(lr_scheduler.last_epoch))
        lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _set_lr(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], Tensor):  # torchao's, which its compiled step reads in place
        group["lr"].fill_(float(lr))
    else:
        group["lr"] = _copied(lr)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
