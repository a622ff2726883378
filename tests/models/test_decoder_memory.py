"""The memory model against torchtune's decoder itself: what autograd saves, and the peak that torch's tracker sees."""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtune import training
from torchtune.models.llama3 import llama3

from hbp_tune.data.batches.batch import Spans
from hbp_tune.models import adapt_decoder, separate_units
from hbp_tune.parallel import AllGatherKV, GroupSwitch, Ulysses, apply_fsdp, build_cp_meshes, build_fsdp_mesh, make_checkpointable
from hbp_tune.parallel.attention import Attention
from hbp_tune.parallel.mesh import CpMesh
from hbp_tune.parallel.parallelize import PackContext
from hbp_tune.planning import CpDegrees, PackingGroup
from hbp_tune.planning.costs.memory import RESERVE_BYTES, DecoderShape, MemoryModel, layer_activations
from hbp_tune.planning.plans.sharding import share_out
from tests.ranks import RankPool

SHAPE = DecoderShape(num_layers=2, embed_dim=256, num_heads=8, num_kv_heads=2, head_dim=32, intermediate_dim=512, vocab_size=1024)
NUM_TOKENS = 1024


class Flash(torch.autograd.Function):
    """Saves what flash attention saves, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros(q.shape, dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[1], q.shape[0]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(x.shape, dtype=x.dtype) for x in ctx.saved_tensors[:3])


def flash(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    return Flash.apply(q, k, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    out = nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True)
    return out[0].transpose(0, 1)


def build(shape: DecoderShape) -> nn.Module:
    fields = {name: getattr(shape, name) for name in ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim")}
    with training.set_default_dtype(torch.bfloat16):
        return llama3(**fields, intermediate_dim=shape.intermediate_dim, max_seq_len=NUM_TOKENS)


def saved_bytes(shape: DecoderShape, group: PackingGroup, attention: Attention, layout: CpDegrees) -> float:
    """Run the first layer and count what autograd saves, per local token, weights apart and shared memory once."""
    model = build(shape)
    layers = adapt_decoder(model).layers
    make_checkpointable(layers)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[tuple[int, int], Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights and tensor.is_floating_point():
            saved[tensor.data_ptr(), tensor.nbytes] = tensor
        return tensor

    local_len = group.pack_len // group.cp_degree
    hidden = torch.randn(1, local_len, shape.embed_dim, dtype=torch.bfloat16, requires_grad=True)
    context = activate(layers, group, attention, layout)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layers[0](hidden, mask=context, input_pos=torch.arange(local_len)[None])
    return sum(tensor.nbytes for tensor in saved.values()) / local_len


def activate(layers: Sequence[nn.Module], group: PackingGroup, attention: Attention, layout: CpDegrees) -> PackContext:
    """Switch layers to a pack that is one document."""
    meshes = build_cp_meshes([layout], "cpu") if layout.cp_degree > 1 else {layout: CpMesh(None, None)}
    gather_rank = dist.get_rank() // layout.ulysses if layout.gather > 1 else 0
    spans = Spans.of_part(share_out([group.pack_len], group.pack_len, layout.gather)[gather_rank])
    batch: Any = SimpleNamespace(group=group, spans=spans, degrees=layout)
    return GroupSwitch(layers, meshes, attention, AllGatherKV() if layout.gather > 1 else Ulysses()).activate(batch)


ONE = CpDegrees()
GROUP = PackingGroup(name="all", pack_len=NUM_TOKENS)


@pytest.mark.parametrize("num_kv_heads", [2, 8])
def test_saved_activations_of_a_layer(num_kv_heads: int) -> None:
    shape = replace(SHAPE, num_kv_heads=num_kv_heads)
    layer = layer_activations(shape, GROUP)
    assert saved_bytes(shape, GROUP, flash, ONE) == layer.attention + layer.mlp


def test_torchs_own_flash_attention_saves_the_same() -> None:
    shape = replace(SHAPE, num_kv_heads=8)
    assert saved_bytes(shape, GROUP, sdpa, ONE) == saved_bytes(shape, GROUP, flash, ONE)


def shared_job(group: PackingGroup, layout: CpDegrees) -> float:
    return saved_bytes(SHAPE, group, flash, layout)


@pytest.mark.parametrize("layout", [CpDegrees(ulysses=2), CpDegrees(gather=2)], ids=["ulysses", "all-gather"])
def test_saved_activations_of_a_shared_layer(ranks: Callable[[int], RankPool], layout: CpDegrees) -> None:
    group = replace(GROUP, cp_degree=2)
    layer = layer_activations(SHAPE, group, layout)
    assert max(ranks(2).run(shared_job, group, layout)) == layer.attention + layer.mlp


def test_a_recomputed_layer_saves_its_input() -> None:
    group = replace(GROUP, ac_layers=2)
    assert saved_bytes(SHAPE, group, flash, ONE) == layer_activations(SHAPE, group).recomputed


def live_tensors() -> dict[int, int]:
    """Bytes of all floating tensors that live, by their memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.is_floating_point()]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_recomputed_layer_keeps_what_its_mode_says(mode: str) -> None:
    shape = replace(SHAPE, num_kv_heads=8)
    group = replace(GROUP, ac_layers=2, ac_mode=mode)
    layers = adapt_decoder(build(shape)).layers
    make_checkpointable(layers)
    context = activate(layers, group, sdpa, ONE)
    positions = torch.arange(NUM_TOKENS)[None]
    before = live_tensors()
    hidden = torch.randn(1, NUM_TOKENS, shape.embed_dim, dtype=torch.bfloat16, requires_grad=True)
    out = layers[0](hidden, mask=context, input_pos=positions)
    kept = sum(size for memory, size in live_tensors().items() if memory not in before) - out.nbytes
    assert kept == NUM_TOKENS * layer_activations(shape, group).recomputed


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def tracked_peak(shape: DecoderShape, group: PackingGroup) -> int:
    """Peak bytes of the second of two steps, by torch's tracker, without computing anything."""
    mesh = build_fsdp_mesh("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(shape)
        layers = adapt_decoder(model).layers
        make_checkpointable(layers)
        units = (*layers, *separate_units(model, ["tok_embeddings", "output"]))
        apply_fsdp(model, units, mesh, compute_dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        ids = torch.zeros(1, group.pack_len, dtype=torch.int64)
        context = activate(layers, group, flash, ONE)
        with tracker:
            for _ in range(2):
                tracker.reset_mod_stats()
                model(ids, mask=context, input_pos=ids, labels=ids, loss_weights=torch.ones(ids.shape)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]


LARGE = DecoderShape(
    num_layers=2, embed_dim=512, num_heads=8, num_kv_heads=2, head_dim=64, intermediate_dim=1792, vocab_size=16032
)


@pytest.mark.usefixtures("eight_ranks")
@pytest.mark.parametrize(
    ("pack_len", "ac_layers", "moment"),
    [(16384, 2, "feed-forward of layer 1"), (16384, 1, "final norm"), (8192, 0, "loss head")],
)
def test_the_peak_of_a_step(pack_len: int, ac_layers: int, moment: str) -> None:
    group = PackingGroup(name="all", pack_len=pack_len, ac_layers=ac_layers)
    peak = MemoryModel(LARGE, world_size=8).peak(group)
    assert peak.name == moment
    modelled = sum(peak.parts.values()) - RESERVE_BYTES - peak.parts["rope_table"]
    assert modelled == pytest.approx(tracked_peak(LARGE, group), rel=0.005)
