"""Changing one document's tokens changes no other document's logits or gradients, bit for bit, in every scheme."""

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hbp_tune.parallel import GroupSwitch, Ulysses, build_cp_meshes, make_checkpointable, sdpa_per_document
from hbp_tune.planning import CpDegrees, PackingGroup
from hbp_tune.planning.plans.sharding import padded_len
from tests.parallel.packs import batch_of, pack_tensors, rank_view
from tests.parallel.toy_decoder import build_toy
from tests.ranks import RankPool

MESHES: dict[CpDegrees, object] = {}
# The second document changes: a long one that is cut, one at a border, one of a single token, one among many.
PACKS = ((20, 150, 30, 1), (64, 64, 128), (100, 1, 100, 7), (9, 14, 3, 40, 5, 80, 9))
CHANGED = 1


def train_twice_job(degrees: CpDegrees, doc_lens: tuple[int, ...], ac_mode: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Give this rank's logits, by row of the pack, and gradients of all other documents' loss, before and after the change."""
    ac = {"ac_layers": 0} if ac_mode == "off" else {"ac_layers": 2, "ac_mode": ac_mode}
    group = PackingGroup(name="all", pack_len=1024, cp_degree=degrees.cp_degree, **ac)
    if degrees not in MESHES:
        MESHES.update(build_cp_meshes([degrees], "cpu", timeout=timedelta(seconds=120)))
    model = build_toy()
    make_checkpointable(model.layers)
    switch = GroupSwitch(model.layers, MESHES, sdpa_per_document, Ulysses())
    padded = padded_len(sum(doc_lens), group.cp_degree, group.pack_len)
    rows, _ = rank_view(doc_lens, padded, degrees, dist.get_rank())
    whole = pack_tensors(doc_lens, padded, seed=3)
    changed = slice(sum(doc_lens[:CHANGED]), sum(doc_lens[: CHANGED + 1]))
    whole["loss_weights"][changed] = 0.0
    logits, grads = [], []
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, args, out: seen.append(out.detach()[0]))
    for _ in range(2):
        batch = batch_of(whole, doc_lens, group, degrees, dist.get_rank())
        model(
            batch.tokens,
            mask=switch.activate(batch),
            input_pos=batch.input_pos,
            labels=batch.labels,
            loss_weights=batch.loss_weights,
        ).backward()
        by_row = torch.zeros(padded, 64)
        by_row[rows] = seen[-1] @ model.head.weight.detach().T
        logits.append(by_row)
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.zero_grad()
        whole["tokens"][changed] = (whole["tokens"][changed] + 17) % 63 + 1
    return logits, grads


@pytest.mark.parametrize("ac_mode", ["off", "selective"])
@pytest.mark.parametrize(
    "degrees",
    [CpDegrees(ulysses=2), CpDegrees(gather=2), CpDegrees(ulysses=4), CpDegrees(gather=4), CpDegrees(ulysses=2, gather=2)],
    ids=lambda degrees: f"u{degrees.ulysses}g{degrees.gather}",
)
def test_a_document_is_alone(ranks: Callable[[int], RankPool], degrees: CpDegrees, ac_mode: str) -> None:
    for doc_lens in PACKS:
        results = ranks(degrees.cp_degree).run(train_twice_job, degrees, doc_lens, ac_mode)
        before, after = (torch.stack([logits[i] for logits, _ in results]).sum(0) for i in range(2))
        start, stop = sum(doc_lens[:CHANGED]), sum(doc_lens[: CHANGED + 1])
        assert torch.equal(before[:start], after[:start])
        assert torch.equal(before[stop:], after[stop:])
        assert not torch.equal(before[start:stop], after[start:stop])
        for _, (grads, changed_grads) in results:
            for name, gradient in grads.items():
                assert torch.equal(gradient, changed_grads[name]), name
                assert gradient.isfinite().all()
