from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor, nn
from torch.autograd import graph
from torch.distributed.tensor import DTensor

from hbp_tune.errors import ConfigError
from hbp_tune.parallel import make_checkpointable
from hbp_tune.parallel.activation_checkpoint import _ATTENTION_OPS, check_offload, set_ac_layers
from hbp_tune.planning import PackingGroup
from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed
from tests.helpers import SHAPE, mixed_lengths, recipe_config
from tests.parallel.collectives import cuda_all_to_all
from tests.parallel.decoders import NUM_LAYERS, OperatorCounter, forward, take_gradients, tiny_decoder
from tests.ranks import RankError, RankPool

MODES = ["full", "selective", "offload"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x)) * scale


def run(layers: list[Layer], ac_layers: int, ac_mode: str = "full") -> tuple[list[int], list[Tensor]]:
    set_ac_layers(layers, ac_layers, ac_mode)
    x = torch.ones(2, 4)
    for layer in layers:
        layer.calls = 0
        layer.zero_grad()
        x = layer(x, scale=0.5)
    x.sum().backward()
    return [layer.calls for layer in layers], [layer.linear.weight.grad.clone() for layer in layers]


@pytest.fixture
def layers() -> list[Layer]:
    torch.manual_seed(0)
    layers = [Layer() for _ in range(4)]
    make_checkpointable(layers)
    return layers


@pytest.mark.parametrize("ac_mode", MODES)
@pytest.mark.parametrize("ac_layers", [0, 1, 3, 4])
def test_exactly_the_first_layers_recompute(layers: list[Layer], ac_layers: int, ac_mode: str) -> None:
    calls, _ = run(layers, ac_layers, ac_mode)
    assert calls == [2] * ac_layers + [1] * (4 - ac_layers)


def test_gradients_are_the_same_and_switching_goes_both_ways(layers: list[Layer]) -> None:
    _, plain = run(layers, 0)
    for ac_layers, ac_mode in ((4, "full"), (0, "full"), (2, "selective"), (4, "offload"), (0, "offload"), (3, "full")):
        _, grads = run(layers, ac_layers, ac_mode)
        assert all(torch.equal(left, right) for left, right in zip(grads, plain, strict=True))


def test_parameter_names_stay_clean(layers: list[Layer]) -> None:
    assert [name for name, _ in layers[0].named_parameters()] == ["linear.weight", "linear.bias"]
    assert isinstance(layers[0], Layer)


def test_equal_layers_share_one_class(layers: list[Layer]) -> None:
    other = Layer()
    make_checkpointable([other])
    assert {type(layer) for layer in [*layers, other]} == {type(other)}


@pytest.mark.parametrize("ac_mode", MODES)
def test_nothing_is_recomputed_without_gradients(layers: list[Layer], ac_mode: str) -> None:
    set_ac_layers(layers, 4, ac_mode)
    with torch.no_grad():
        layers[0](torch.ones(2, 4))
    assert layers[0].calls == 1


@pytest.mark.parametrize("ac_mode", MODES)
@pytest.mark.parametrize("ac_layers", [0, 1, NUM_LAYERS])
def test_attention_runs_again_unless_it_is_kept(ac_layers: int, ac_mode: str) -> None:
    model, parts = tiny_decoder()
    plain_loss = forward(model, 48)
    plain_loss.backward()
    plain = take_gradients(model)
    make_checkpointable(parts.layers)
    set_ac_layers(parts.layers, ac_layers, ac_mode)
    with OperatorCounter() as first:
        loss = forward(model, 48)
    with OperatorCounter() as second:
        loss.backward()
    assert first.attention == NUM_LAYERS
    assert second.attention == (0 if ac_mode == "selective" else ac_layers)
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(left, right) for left, right in zip(take_gradients(model), plain, strict=True))


def kept_bytes(ac_mode: str, ac_layers: int) -> int:
    """Sum the tensors that autograd keeps of a forward in other memory than weights, once each."""
    model, parts = tiny_decoder()
    make_checkpointable(parts.layers)
    set_ac_layers(parts.layers, ac_layers, ac_mode)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward(model, 256)
    assert loss.requires_grad
    return sum(kept.values())


def test_full_recomputation_keeps_layer_inputs_alone() -> None:
    # One more layer keeps its input, 256 tokens of 32 fp32 numbers, in the place of all that it makes.
    inputs = 256 * 32 * 4
    assert kept_bytes("full", 3) - kept_bytes("full", 4) > 10 * inputs


def test_names_of_operators_are_those_of_torch() -> None:
    varlen = torch.nn.attention.varlen._varlen_attn._opoverload
    assert varlen.name() in _ATTENTION_OPS
    own = [name.removeprefix("aten::") for name in _ATTENTION_OPS if name.startswith("aten::")]
    assert len(own) >= 8
    assert [name for name in own if not hasattr(torch.ops.aten, name)] == []


@pytest.mark.parametrize("ac_layers", [0, 1, NUM_LAYERS])
def test_offload_moves_each_layers_input_and_nothing_else(monkeypatch: pytest.MonkeyPatch, ac_layers: int) -> None:
    moved, fetched = [], []

    class Watched(graph.save_on_cpu):
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(pin_memory)
            assert pin_memory, "slow copies"
            to_host, from_host = self.pack_hook, self.unpack_hook
            self.pack_hook = lambda x: (moved.append(x), to_host(x))[1]
            self.unpack_hook = lambda packed: (fetched.append(packed), from_host(packed))[1]

    monkeypatch.setattr("hbp_tune.parallel.activation_checkpoint.save_on_cpu", Watched)
    model, parts = tiny_decoder()
    make_checkpointable(parts.layers)
    set_ac_layers(parts.layers, ac_layers, "offload")
    loss = forward(model, 48)
    moved = [x for x in moved if x.numel()]  # torch 2.11 saves an empty tensor beside the input
    assert [x.shape for x in moved] == [(1, 48, 32)] * ac_layers
    storages = [x.untyped_storage().data_ptr() for x in moved]
    del moved[:]
    loss.backward()
    fetched = [packed for _, packed in fetched if packed.numel()]
    assert [x.shape for x in fetched] == [(1, 48, 32)] * ac_layers
    copies = [x.untyped_storage().data_ptr() for x in fetched]
    assert not set(copies) & set(storages), "a copy, not the tensor itself"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_offload_frees_the_devices_memory() -> None:
    model, parts = tiny_decoder()
    model.cuda()
    make_checkpointable(parts.layers)
    x = torch.zeros(1, 2**16, 32, device="cuda", requires_grad=True)

    class NoAttention:
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return q * 1.0

    def kept(ac_mode: str) -> int:
        set_ac_layers(parts.layers, NUM_LAYERS, ac_mode)
        before = torch.cuda.memory_allocated()
        out = x
        for layer in parts.layers:
            out = layer(out, mask=NoAttention(), input_pos=torch.zeros(1, 2**16, dtype=torch.int64, device="cuda"))
        after = torch.cuda.memory_allocated()
        out.sum().backward()
        return after - before

    layer_input = 2**16 * 32 * 4
    # The first layer's input stays in any case.
    assert kept("full") - kept("offload") > 0.9 * (NUM_LAYERS - 1) * layer_input


def test_offload_needs_a_device() -> None:
    group = PackingGroup(name="long", pack_len=64, ac_layers=2, ac_mode="offload")
    with pytest.raises(
        ConfigError, match=r"^group 'long': ac_mode=offload needs device=cuda, device is cpu; use full or selective$"
    ):
        check_offload([group], "cpu")
    check_offload([group], "cuda")
    check_offload([replace(group, ac_layers=0), replace(group, ac_mode="selective")], "cpu")


GROUPS = [{"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 512, "cp_degree": 2}]


def modes_job(cfg: Any, exchange: Callable[[], AbstractContextManager[None]]) -> dict[tuple[int, str], Any]:
    """Give what runs forward and backward, loss and gradients of one pack a CP degree, in every mode."""
    recipe = HBPFullFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    with exchange():
        return run_modes(recipe)


def run_modes(recipe: HBPFullFinetuneRecipeDistributed) -> dict[tuple[int, str], Any]:
    found = {}
    for batch in {batch.group.cp_degree: batch for batch in recipe._epoch_batches(0)}.values():
        for ac_mode in ("off", *MODES):
            group = replace(batch.group, ac_layers=0) if ac_mode == "off" else replace(batch.group, ac_layers=3, ac_mode=ac_mode)
            pack = recipe._switch.activate(replace(batch, group=group))
            with OperatorCounter() as first:
                loss = recipe._model(
                    batch.tokens, mask=pack, input_pos=batch.input_pos, labels=batch.labels, loss_weights=batch.loss_weights
                )
            with OperatorCounter() as second:
                loss.backward()
            grads = [p.grad.to_local().clone() for p in recipe._model.parameters() if isinstance(p.grad, DTensor)]
            recipe._model.zero_grad()
            counts = [(counter.attention, dict(counter.collectives)) for counter in (first, second)]
            found[batch.group.cp_degree, ac_mode] = (*counts, loss.item(), grads)
    return found


SCHEMES = [("ulysses", nullcontext), ("ulysses", cuda_all_to_all), ("all_gather", nullcontext)]


@pytest.fixture(scope="module", params=SCHEMES, ids=lambda scheme: f"{scheme[0]}-{scheme[1].__name__}")
def modes(
    ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[Any]:
    assert SHAPE.num_layers == 3
    scheme, exchange = request.param
    lengths = mixed_lengths(40, 512, seed=3)
    cfg = recipe_config(tmp_path_factory.mktemp("modes"), lengths, GROUPS, context_parallel=scheme)
    return ranks(2).run(modes_job, cfg, exchange)


@pytest.mark.parametrize("cp_degree", [1, 2])
def test_neither_attention_nor_communication_is_repeated_where_it_is_kept(modes: list[Any], cp_degree: int) -> None:
    for found in modes:
        (attention, collectives), (no_attention, backward), *_ = found[cp_degree, "off"]
        assert attention >= 3
        assert no_attention == 0
        assert bool(collectives) == bool(backward) == (cp_degree > 1)
        for ac_mode in MODES:
            first, (again, collectives_again), *_ = found[cp_degree, ac_mode]
            assert first == (attention, collectives)
            if ac_mode == "selective":
                assert (again, collectives_again) == (0, backward)
            else:
                assert again == attention
                assert sum(collectives_again.values()) > sum(backward.values()) or cp_degree == 1


@pytest.mark.parametrize("cp_degree", [1, 2])
@pytest.mark.parametrize("ac_mode", MODES)
def test_gradients_are_bit_for_bit_those_without_recomputation(modes: list[Any], cp_degree: int, ac_mode: str) -> None:
    for found in modes:
        *_, plain_loss, plain = found[cp_degree, "off"]
        *_, loss, grads = found[cp_degree, ac_mode]
        assert loss == plain_loss
        assert len(grads) == len(plain) > 20
        assert all(torch.equal(left, right) for left, right in zip(grads, plain, strict=True))


def test_the_recipe_refuses_offload_without_a_device(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    group = {**GROUPS[0], "ac_layers": 1, "ac_mode": "offload"}
    cfg = recipe_config(tmp_path, [5, 6], [group])
    with pytest.raises(
        RankError, match=r"group 'short': ac_mode=offload needs device=cuda, device is cpu; use full or selective"
    ):
        ranks(2).run(HBPFullFinetuneRecipeDistributed, cfg)
