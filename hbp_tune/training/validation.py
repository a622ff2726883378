"""The loss on held-out data, by length and by source, through the same packs, kernels and context parallelism as training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hbp_tune.data.batches.dataset import HierarchicalPackedDataset, Layout, pack_loader
from hbp_tune.data.store.store import TokenStore
from hbp_tune.errors import DataError, HbpError
from hbp_tune.parallel.loss_head import TokenLossHead
from hbp_tune.parallel.parallelize import GroupSwitch
from hbp_tune.planning.costs.cost import CostModel
from hbp_tune.planning.packing.planner import BalancePlanner
from hbp_tune.planning.plans.records import EpochPlan, PackingGroup
from hbp_tune.planning.plans.truncation import cut_of

# Documents of up to so many tokens are the shortest bucket; the others double it.
SHORTEST_BUCKET = 1024


def plan_validation(
    planner: BalancePlanner, store: TokenStore, groups: Sequence[PackingGroup], *, world_size: int, cost: CostModel
) -> EpochPlan:
    """Plan the held-out data as training data are planned; the plan is the same for every seed.

    Args:
        planner: of the run, which also decides what happens to overlong samples.
        store: of the held-out data.
        groups: of the run.
        world_size: ranks of the run.
        cost: of the model.

    Raises:
        HbpError: the planner cannot place the data; of the planner's own kind.
        DataError: no sample has a target.
    """  # noqa: DOC502 - the kind is not known here
    overlong = getattr(planner, "overlong", "error")  # a planner of the user's may have none
    num_targets = store.num_targets_within(groups[-1].pack_len, cut_of(overlong))
    if not num_targets.any():
        raise DataError("dataset_val has no target: no sample has an assistant turn that counts toward the loss; check its rows")
    # A step without a target divides nothing here; only samples that are cut must have one left.
    always_a_target = np.where(store.lengths > groups[-1].pack_len, num_targets, 1)
    try:
        return planner.plan(store.lengths, always_a_target, groups, world_size=world_size, seed=0, cost=cost)
    except HbpError as error:
        raise type(error)(f"dataset_val: {error}") from error


def bucket_bounds(longest: int, shortest: int = SHORTEST_BUCKET) -> NDArray[np.int64]:
    """Give the most tokens of each length bucket: ``shortest`` doubled until it holds ``longest``, ``int64[buckets]``."""
    bounds = [shortest]
    while bounds[-1] < longest:
        bounds.append(2 * bounds[-1])
    return np.array(bounds, dtype=np.int64)


class Validator:
    """Measures the mean loss over all targets, those of each length bucket, and those of each source.

    Training goes on as if nothing had happened: no random number is drawn, and loss head, mode and weights are as before.

    Args:
        store: of the held-out data.
        plan: of `plan_validation`.
        labels: of the data sets, by ``store.sources``.
        rank: whose packs to run.
        layout: how the ranks of a pack divide attention.
        num_workers: that load packs.
    """

    def __init__(
        self, store: TokenStore, plan: EpochPlan, labels: Sequence[str], *, rank: int, layout: Layout, num_workers: int = 0
    ) -> None:
        self._bounds = bucket_bounds(plan.groups[-1].pack_len)
        self._labels = labels
        classes = np.searchsorted(self._bounds, plan.lengths) * len(labels) + store.sources[plan.sample_ids]
        self._dataset = HierarchicalPackedDataset(store, plan, np.ones(len(classes)), rank, layout, classes)
        self._indices = plan.indices_for_rank(rank)
        self._num_workers = num_workers

    def run(self, model: nn.Module, switch: GroupSwitch, device: torch.device) -> dict[str, float]:
        """Run all held-out packs; collective: every rank must call it.

        Args:
            model: the decoder that ``switch`` belongs to; its forward ends in its ``loss_head``.
            switch: sets the group of each pack.
            device: of the run.

        Returns:
            ``val_loss``, ``val_loss_len_1024`` (documents of at most 1024 tokens), ``val_loss_len_2048`` (of 1025 to 2048) and
            so on, and ``val_loss_<label>`` where there are several sources; equal on every rank. What has no target is left out.
        """
        # By bucket, source: the sum of losses, and the number of targets.
        totals = torch.zeros(len(self._bounds) * len(self._labels), 2, dtype=torch.float64, device=device)
        with _measuring(model):
            for batch in pack_loader(self._dataset, self._indices, self._num_workers):
                batch = batch.to(device)
                losses: Tensor = model(
                    batch.tokens,
                    mask=switch.activate(batch),
                    input_pos=batch.input_pos,
                    labels=batch.labels,
                    loss_weights=batch.loss_weights,
                )
                counts = batch.loss_weights  # ones on targets, zeros elsewhere
                totals.index_add_(0, batch.classes[0], torch.stack((losses[0], counts[0]), dim=1).double())
        dist.all_reduce(totals)
        return self._means(totals.view(len(self._bounds), len(self._labels), 2).cpu())

    def _means(self, totals: Tensor) -> dict[str, float]:
        by_bucket, by_source = totals.sum(dim=1), totals.sum(dim=0)
        sums = {"val_loss": totals.sum(dim=(0, 1))}
        sums |= {f"val_loss_len_{bound}": total for bound, total in zip(self._bounds, by_bucket, strict=True)}
        if len(self._labels) > 1:
            sums |= {f"val_loss_{label}": total for label, total in zip(self._labels, by_source, strict=True)}
        return {name: (loss_sum / count).item() for name, (loss_sum, count) in sums.items() if count}


def describe_validation(step: int, metrics: dict[str, float]) -> str:
    """Put the losses of a validation after ``step`` into one line."""
    losses = ", ".join(f"{name.removeprefix('val_loss_')} {loss:.4f}" for name, loss in metrics.items())
    return f"Validation after step {step}: {losses}"


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Let the model give token losses without gradients, and leave it as it was."""
    decoder = cast(Any, model)  # torch's modules do not say what their attributes are
    loss_head, was_training = decoder.loss_head, model.training
    decoder.loss_head = TokenLossHead()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        decoder.loss_head = loss_head
        model.train(was_training)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # no backward comes that would free gathered weights
