"""One process that trains what a plan gives to many ranks: the same packs, weights and steps, one pack after another."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import join_world
from numpy.typing import NDArray
from quality.needles import CODES_PER_KEY, NUM_NEEDLES
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hbp_tune.data import HierarchicalPackedDataset, PackBatch, TokenStore
from hbp_tune.data.tokenizing.conversation import IGNORE_INDEX
from hbp_tune.demo.model import TinyLlama, build, random_state_dict
from hbp_tune.demo.tokenizer import VOCAB_SIZE
from hbp_tune.models import adapt_decoder
from hbp_tune.parallel import (
    ForwardGradientHead,
    GroupSwitch,
    Ulysses,
    apply_fsdp,
    build_cp_meshes,
    build_fsdp_mesh,
    make_checkpointable,
    select_attention,
)
from hbp_tune.planning import EpochPlan

CPU = torch.device("cpu")
# 5.2 million weights. Few, wide layers: attention over 8K tokens takes most of the time, and all layers have it. One matrix for
# input and output, so that copying a token from the context is learned for all tokens at once.
SHAPE = TinyLlama(
    vocab_size=VOCAB_SIZE + NUM_NEEDLES * CODES_PER_KEY,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    embed_dim=256,
    intermediate_dim=1152,
    max_position_embeddings=8192,
    tied=True,
)
CLIP_GRAD_NORM = 1.0
# Adam's second moment forgets in a hundred steps, which is what these runs have.
BETAS, WEIGHT_DECAY, WARMUP_SHARE, LAST_LR_SHARE = (0.9, 0.98), 0.01, 0.05, 0.1


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """An optimizer step as it was trained.

    Args:
        group: that its packs belong to.
        loss: mean over the step's targets, whatever they weigh in the loss that is trained.
        grad_norm: of that weighted loss, before clipping.
        num_tokens: of its documents.
        num_targets: among them.
    """

    group: str
    loss: float
    grad_norm: float
    num_tokens: int
    num_targets: int


class MeasuringHead:
    """Passes on to the usual loss head, and keeps the loss of each target and whether it was the likeliest token."""

    def __init__(self) -> None:
        self._head = ForwardGradientHead()
        self.losses: list[Tensor] = []
        self.is_hit: list[Tensor] = []

    def check(self, device: torch.device, document_weights: NDArray[np.float64], pack_of_sample: NDArray[np.int64]) -> None:
        """Take any weights on any device, as the usual head does."""
        self._head.check(device, document_weights, pack_of_sample)

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
        """Give the weighted sum of token losses; see `LossHead`."""
        counts = labels[0] != IGNORE_INDEX
        with torch.no_grad():
            logits, targets = F.linear(hidden[0, counts], weight).float(), labels[0, counts]
            self.losses.append(F.cross_entropy(logits, targets, reduction="none"))
            self.is_hit.append(logits.argmax(-1) == targets)
        return self._head(hidden, weight, labels, loss_weights)

    def take(self) -> tuple[Tensor, Tensor]:
        """Give what was kept since the last call, target by target in the order of training, and forget it."""
        losses, is_hit = torch.cat(self.losses), torch.cat(self.is_hit)
        self.losses, self.is_hit = [], []
        return losses, is_hit


class Learner:
    """A small decoder in mixed precision: fp32 weights, bf16 forward and backward, as FSDP2 does it on a GPU.

    Args:
        weights: to start from, by torchtune's names; random ones where left out.
    """

    def __init__(self, weights: dict[str, Tensor] | None = None) -> None:
        if not torch.distributed.is_initialized():
            join_world(CPU)
        self.model = build(SHAPE)
        self.model.load_state_dict(weights or random_state_dict(SHAPE, seed=0))
        self.head = MeasuringHead()
        layers = adapt_decoder(self.model, loss_head=self.head).layers
        make_checkpointable(layers)
        apply_fsdp(self.model, layers, build_fsdp_mesh("cpu"), compute_dtype=torch.bfloat16)
        attention, _ = select_attention("sdpa", CPU, torch.bfloat16)
        self._switch = GroupSwitch(layers, build_cp_meshes([], "cpu"), attention, Ulysses())

    def forward(self, batch: PackBatch) -> Tensor:
        """Give a pack's weighted sum of token losses."""
        context = self._switch.activate(batch)
        arguments = {"input_pos": batch.input_pos, "labels": batch.labels, "loss_weights": batch.loss_weights}
        loss: Tensor = self.model(batch.tokens, mask=context, **arguments)
        return loss

    def weights(self) -> dict[str, Tensor]:
        """Copy the weights, by torchtune's names."""
        return {name: value.full_tensor().clone() for name, value in self.model.state_dict().items()}

    def train(
        self, store: TokenStore, plan: EpochPlan, document_weights: NDArray[np.float64], *, peak_lr: float
    ) -> Iterator[StepRecord]:
        """Train one epoch, and yield every step once it is done.

        Args:
            store: of the samples.
            plan: for any number of ranks; their packs are trained one after another.
            document_weights: ``float64[placed]``, of that plan.
            peak_lr: after a linear rise, before a cosine's fall.
        """
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=peak_lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, plan.num_steps))
        serial = on_one_rank(plan)
        packs = HierarchicalPackedDataset(store, serial, document_weights, rank=0)
        num_tokens = 0
        for index in range(len(packs)):
            batch = packs[index]
            num_tokens += batch.num_tokens
            self.forward(batch).backward()
            if not batch.is_last_micro_step:
                continue
            grad_norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses, _ = self.head.take()
            yield StepRecord(
                group=batch.group.name,
                loss=losses.mean().item(),
                grad_norm=(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm).item(),
                num_tokens=num_tokens,
                num_targets=len(losses),
            )
            num_tokens = 0


def lr_share(step: int, num_steps: int) -> float:
    """Give the share of the peak learning rate: a linear rise, then a cosine down to a tenth."""
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return LAST_LR_SHARE + (1 - LAST_LR_SHARE) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def on_one_rank(plan: EpochPlan) -> EpochPlan:
    """Give the plan with the same packs in the same steps for one rank: a pack a micro-step, none empty, none shared."""
    is_filled = np.diff(plan.pack_offsets) > 0
    step = plan.pack_step[is_filled]
    starts = np.searchsorted(step, step)
    return replace(
        plan,
        groups=tuple(replace(group, cp_degree=1) for group in plan.groups),
        world_size=1,
        pack_offsets=np.concatenate((plan.pack_offsets[:-1][is_filled], plan.pack_offsets[-1:])),
        pack_group=plan.pack_group[is_filled],
        pack_step=step,
        pack_micro_step=(np.arange(len(step)) - starts).astype(np.int16),
        pack_first_rank=np.zeros(len(step), dtype=np.int32),
    )
