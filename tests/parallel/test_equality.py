"""A decoder over ranks against one process with a dense mask: loss and the gradient of every parameter, whatever is parallel."""

import itertools
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hbp_tune.data import PackBatch
from hbp_tune.parallel import (
    GroupSwitch,
    apply_fsdp,
    build_cp_meshes,
    build_fsdp_mesh,
    make_checkpointable,
    select_attention,
    select_context_parallel,
)
from hbp_tune.parallel.context_parallel import ContextParallel, UlyssesAllGather
from hbp_tune.parallel.mesh import CpMeshes
from hbp_tune.planning import PackingGroup
from hbp_tune.planning.costs.exchange import AttentionHeads
from hbp_tune.planning.plans.sharding import padded_len
from tests.parallel.packs import batch_of, dense, pack_tensors
from tests.parallel.toy_decoder import ToyDecoder, build_toy
from tests.ranks import RankPool

HEADS = 8
# Documents that start, end and cross at the borders of shards, of one token, long and short together, one that fills a pack.
PACKS: tuple[tuple[int, ...], ...] = (
    (32, 32, 64),
    (1, 47, 3, 1, 47, 1, 28),
    (1,) * 9 + (100,),
    (250,),
    (17, 3, 40, 5, 80, 9),
    (),  # a replica without work
)
# The same at four to eight times the length, for eight ranks.
LONG_PACKS = ((128, 128, 256), (1, 190, 3, 1, 190, 1, 126), (1,) * 40 + (300,), (1000,), (17, 3, 40, 5, 80, 9) * 4, ())


@dataclass(frozen=True, kw_only=True)
class Case:
    world_size: int = 4
    scheme: str = "ulysses"
    kv_heads: int = 2
    heads: int = HEADS
    ac_mode: str = "off"
    micro_steps: int = 1
    sharded_accumulation: bool = True
    dtype: torch.dtype = torch.float64
    compute_dtype: torch.dtype | None = None
    pool: tuple[tuple[int, ...], ...] = PACKS

    @property
    def groups(self) -> list[PackingGroup]:
        """One group for every CP degree; steps alternate between them, and half of the layers recompute."""
        degrees = [degree for degree in (1, 2, 4, 8) if degree <= self.world_size]
        ac = {"ac_layers": 0} if self.ac_mode == "off" else {"ac_layers": 1, "ac_mode": self.ac_mode}
        return [PackingGroup(name=f"cp{degree}", pack_len=1024, cp_degree=degree, **ac) for degree in degrees]

    def packs(self, group: PackingGroup, step: int) -> list[list[tuple[int, ...]]]:
        """The documents of every replica's pack in every micro-step; one replica of a step at most has no work."""
        replicas = self.world_size // group.cp_degree
        pool = itertools.cycle(self.pool[step % len(self.pool) :] + self.pool[: step % len(self.pool)])
        packs = [[next(pool) for _ in range(replicas)] for _ in range(self.micro_steps)]
        if not any(itertools.chain.from_iterable(packs)):
            packs[0][0] = self.pool[0]  # a step trains something
        return packs


def scheme_of(name: str) -> ContextParallel:
    return UlyssesAllGather(ulysses_degree=2) if name == "both" else select_context_parallel(name)


def batches_of(case: Case, group: PackingGroup, step: int, scheme: ContextParallel, rank: int) -> Iterator[PackBatch]:
    """Build this rank's batches of a step by hand."""
    heads = AttentionHeads(query=case.heads, kv=case.kv_heads)
    replica, cp_rank = divmod(rank, group.cp_degree)
    packs = case.packs(group, step)
    for micro_step, replicas in enumerate(packs):
        doc_lens = replicas[replica]
        padded = padded_len(sum(doc_lens), group.cp_degree, group.pack_len)
        degrees = scheme.layout(heads, group.cp_degree, doc_lens, padded)
        whole = pack_tensors(doc_lens, padded, seed=100 * step + 10 * micro_step + replica)
        batch = batch_of(whole, doc_lens, group, degrees, cp_rank)
        yield replace(batch, step=step, is_last_micro_step=micro_step == len(packs) - 1)


MESHES: defaultdict[str, CpMeshes] = defaultdict(dict)  # by device type


def train_job(case: Case, steps: int, device_type: str = "cpu") -> list[tuple[float, dict[str, Tensor]]]:
    """Give the loss and every parameter's gradient of each step."""
    device, compute_dtype = torch.device(device_type), case.compute_dtype or case.dtype
    model = build_toy(dtype=case.dtype, heads=case.heads, kv_heads=case.kv_heads, dim=8 * case.heads).to(device)
    scheme = scheme_of(case.scheme)
    heads = AttentionHeads(query=case.heads, kv=case.kv_heads)
    layouts = [layout for group in case.groups for layout in scheme.layouts(heads, group.cp_degree)]
    meshes = MESHES[device_type]
    if not set(layouts) <= meshes.keys():  # once per rank of the pool: process groups are not free
        meshes.update(build_cp_meshes(layouts, device_type, timeout=timedelta(seconds=120)))
    make_checkpointable(model.layers)
    apply_fsdp(model, model.layers, build_fsdp_mesh(device_type), compute_dtype=compute_dtype)
    switch = GroupSwitch(model.layers, meshes, select_attention("auto", device, compute_dtype)[0], scheme)
    results = []
    for step in range(steps):
        group = case.groups[step % len(case.groups)]
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for batch in (batch.to(device) for batch in batches_of(case, group, step, scheme, dist.get_rank())):
            model.set_requires_gradient_sync(case.sharded_accumulation or batch.is_last_micro_step)
            loss = model(
                batch.tokens,
                mask=switch.activate(batch),
                input_pos=batch.input_pos,
                labels=batch.labels,
                loss_weights=batch.loss_weights,
            )
            (loss * dist.get_world_size()).backward()
            loss_sum += loss.detach().double()
        dist.all_reduce(loss_sum)
        grads = {name: parameter.grad.full_tensor().cpu() for name, parameter in model.named_parameters()}
        results.append((loss_sum.item(), grads if dist.get_rank() == 0 else {}))
        model.zero_grad()
    return results


class DenseMask:
    """Stands where the pack stands: plain attention under one dense mask."""

    def __init__(self, doc_lens: Sequence[int]) -> None:
        self.doc_lens = doc_lens

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(q, k, v, self.doc_lens)


def dense_loss(model: ToyDecoder, doc_lens: Sequence[int], tensors: dict[str, Tensor]) -> Tensor:
    """One pack's loss by nothing of ours: all logits, torch's cross entropy."""
    real = {name: tensor[: sum(doc_lens)][None] for name, tensor in tensors.items()}
    x = model.embed(real["tokens"]) + model.positions(real["input_pos"])
    for layer in model.layers:
        x = layer(x, mask=DenseMask(doc_lens))
    losses = F.cross_entropy(model.head(model.norm(x))[0], real["labels"][0], ignore_index=-100, reduction="none")
    return (losses * real["loss_weights"][0]).sum()


def plain_case(case: Case) -> Case:
    """Forget what one process does not know, so that cases share their reference."""
    return replace(case, scheme="ulysses", ac_mode="off", sharded_accumulation=True, compute_dtype=None)


@cache
def reference(case: Case, steps: int) -> list[tuple[float, dict[str, Tensor]]]:
    """The same steps in one process, in the case's dtype (of its weights)."""
    model = build_toy(dtype=case.dtype, heads=case.heads, kv_heads=case.kv_heads, dim=8 * case.heads)
    results = []
    for step in range(steps):
        group = case.groups[step % len(case.groups)]
        losses = [
            dense_loss(
                model,
                doc_lens,
                pack_tensors(doc_lens, padded_len(sum(doc_lens), group.cp_degree, 1024), 100 * step + 10 * micro_step + replica),
            )
            for micro_step, replicas in enumerate(case.packs(group, step))
            for replica, doc_lens in enumerate(replicas)
            if doc_lens
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        results.append((loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}))
        model.zero_grad()
    return results


def assert_equal_training(case: Case, results: list[tuple[float, dict[str, Tensor]]], tolerance: float) -> None:
    for step, ((loss, grads), (want_loss, want_grads)) in enumerate(
        zip(results, reference(plain_case(case), len(results)), strict=True)
    ):
        assert loss == pytest.approx(want_loss, rel=tolerance), f"loss of step {step}"
        for name, want in want_grads.items():
            error = (grads[name].double() - want.double()).norm() / want.double().norm()
            assert error <= tolerance, f"gradient of {name} in step {step}: {error:.2e}"


def assert_close_in_bf16(case: Case, results: list[tuple[float, dict[str, Tensor]]]) -> None:
    """Compare the loss within 0.1% and the whole gradient within 1.5% of its norm.

    bf16 keeps 8 bits, an error of up to 0.4% an operation; 0.003% and 0.6% were seen. Gradients of gathered keys that do not add
    up over the ranks make 3% to 5%, keys that are one row off 9% to 11%.
    """
    for (loss, grads), (want_loss, want) in zip(results, reference(plain_case(case), len(results)), strict=True):
        assert loss == pytest.approx(want_loss, rel=1e-3)
        got, whole = (torch.cat([some[name].flatten() for name in want]) for some in (grads, want))
        assert (got - whole).norm() <= 1.5e-2 * whole.norm()


FACTORS = {
    "world_size": (2, 4),
    "scheme": ("ulysses", "all_gather", "both", "auto"),
    "kv_heads": (1, 2, 4, 8),
    "ac_mode": ("off", "full", "selective", "offload"),
    "micro_steps": (1, 3),
    "sharded_accumulation": (True, False),
    "dtype": (torch.float64, torch.float32),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def pairwise() -> list[Case]:
    """Choose cases until every two values of two factors meet in one, each time the case with the most new pairs."""
    product = [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    pairs = [{((a, x), (b, y)) for (a, x), (b, y) in itertools.combinations(case.items(), 2)} for case in product]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(product)), key=lambda index: len(pairs[index] & missing))
        missing -= pairs[best]
        chosen.append(Case(**product[best]))
    return chosen


def name_of(case: Case) -> str:
    dtype = str(case.dtype).removeprefix("torch.float")
    gradients = "" if case.sharded_accumulation else " whole"
    name = f"{case.world_size} ranks-{case.scheme}-kv{case.kv_heads}-{case.ac_mode}-micro{case.micro_steps}{gradients}"
    return f"{name}-fp{dtype}"


@pytest.mark.parametrize("case", pairwise(), ids=name_of)
def test_loss_and_gradients_equal_one_process(ranks: Callable[[int], RankPool], case: Case) -> None:
    results = ranks(case.world_size).run(train_job, case, 6)[0]
    assert_equal_training(case, results, TOLERANCE[case.dtype])


@pytest.mark.parametrize("scheme", ["ulysses", "auto"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 1), (14, 2), (6, 2)])
def test_heads_that_do_not_divide_equal_one_process(
    ranks: Callable[[int], RankPool], scheme: str, heads: int, kv_heads: int
) -> None:
    case = Case(scheme=scheme, heads=heads, kv_heads=kv_heads)
    assert_equal_training(case, ranks(4).run(train_job, case, 3)[0], 1e-10)


@pytest.mark.parametrize("scheme", ["ulysses", "all_gather"])
def test_bf16_compute_stays_within_its_tolerance(ranks: Callable[[int], RankPool], scheme: str) -> None:
    case = Case(scheme=scheme, dtype=torch.float32, compute_dtype=torch.bfloat16, ac_mode="full")
    assert_close_in_bf16(case, ranks(4).run(train_job, case, 3)[0])


@pytest.mark.slow
@pytest.mark.parametrize("ac_mode", FACTORS["ac_mode"])
@pytest.mark.parametrize("scheme", FACTORS["scheme"])
@pytest.mark.parametrize("world_size", FACTORS["world_size"])
def test_the_full_product_equals_one_process(
    ranks: Callable[[int], RankPool], world_size: int, scheme: str, ac_mode: str
) -> None:
    for kv_heads, micro_steps, dtype in itertools.product(*(FACTORS[name] for name in ("kv_heads", "micro_steps", "dtype"))):
        case = Case(
            world_size=world_size,
            scheme=scheme,
            ac_mode=ac_mode,
            kv_heads=kv_heads,
            micro_steps=micro_steps,
            dtype=dtype,
        )
        assert_equal_training(case, ranks(world_size).run(train_job, case, len(case.groups))[0], TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", FACTORS["scheme"])
def test_eight_ranks_equal_one_process(ranks: Callable[[int], RankPool], scheme: str) -> None:
    for kv_heads, ac_mode in zip((1, 2, 4, 8), FACTORS["ac_mode"], strict=True):
        case = Case(world_size=8, scheme=scheme, ac_mode=ac_mode, kv_heads=kv_heads, pool=LONG_PACKS)
        assert_equal_training(case, ranks(8).run(train_job, case, 4)[0], 1e-10)


def test_the_toy_decoder_and_parallel_need_no_torchtune() -> None:
    """Import what a decoder needs in a fresh interpreter; torchtune must not come along."""
    code = "import sys, tests.parallel.toy_decoder, hbp_tune.parallel.parallelize; assert 'torchtune' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
