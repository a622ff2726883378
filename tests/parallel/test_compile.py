import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torchtune.modules import TransformerSelfAttentionLayer

from hbp_tune.models import DecoderParts
from hbp_tune.parallel import compile_layers, make_checkpointable
from hbp_tune.parallel.activation_checkpoint import set_ac_layers
from hbp_tune.recipes.hbp_full_finetune_distributed import HBPFullFinetuneRecipeDistributed
from tests.helpers import mixed_lengths, recipe_config
from tests.parallel.decoders import NUM_LAYERS, OperatorCounter, forward, take_gradients, tiny_decoder
from tests.ranks import RankPool

# A norm, query to value with positions, attention's output, and the rest: torch ends a graph at every call around the hook.
GRAPHS = 4
# At the second length two of them learn that tokens vary: those that take a length or a tensor from between the graphs.
ALL_GRAPHS = GRAPHS + 2
MODES = [("full", 0), ("full", 2), ("selective", NUM_LAYERS), ("offload", 3)]


class CountingBackend:
    """Runs graphs by torch's own operators; counts how many are made, and how often they run forward."""

    def __init__(self) -> None:
        self.made = self.runs = 0

    def __call__(self, graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        self.made += 1
        call = aot_eager(graph, inputs)

        def run(*args: Any) -> Any:
            self.runs += 1
            return call(*args)

        return run


@pytest.fixture(scope="module", autouse=True)
def no_graphs() -> Iterator[None]:
    """Count graphs from nothing, and leave none to other tests."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operators of microseconds: threads would only wait for each other
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(num_threads)


def compiled_decoder(backend: Any) -> tuple[nn.Module, DecoderParts]:
    model, parts = tiny_decoder()
    compile_layers(parts.layers, backend=backend)
    make_checkpointable(parts.layers)
    return model, parts


@pytest.fixture(scope="module")
def warm(no_graphs: None) -> tuple[nn.Module, DecoderParts, CountingBackend, list[int]]:
    """Give a decoder that has trained on two lengths, its backend, and the graphs after each; one for all tests, for speed."""
    backend = CountingBackend()
    model, parts = compiled_decoder(backend)
    made = []
    for num_tokens in (32, 64):  # the model is as wide as the first
        forward(model, num_tokens).backward()
        made.append(backend.made)
    model.zero_grad()
    return model, parts, backend, made


def assert_equal_training(model: nn.Module, parts: DecoderParts, num_tokens: int) -> None:
    plain, _ = tiny_decoder()
    for ac_mode, ac_layers in MODES:
        set_ac_layers(parts.layers, ac_layers, ac_mode)
        want, got = forward(plain, num_tokens), forward(model, num_tokens)
        want.backward()
        got.backward()
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        for left, right in zip(take_gradients(model), take_gradients(plain), strict=True):
            assert (left - right).norm() <= 1e-5 * right.norm()


def test_all_layers_share_graphs(warm: Any) -> None:
    *_, made = warm
    assert made == [GRAPHS, ALL_GRAPHS]


@pytest.mark.parametrize("num_tokens", [33, 256, 2])
def test_modes_and_lengths_share_graphs_and_train_as_without_them(warm: Any, num_tokens: int) -> None:
    model, parts, backend, _ = warm
    assert_equal_training(model, parts, num_tokens)
    assert backend.made == ALL_GRAPHS


@pytest.mark.parametrize(("ac_mode", "ac_layers"), MODES)
def test_layers_recompute_by_graphs(warm: Any, ac_mode: str, ac_layers: int) -> None:
    model, parts, backend, _ = warm
    set_ac_layers(parts.layers, ac_layers, ac_mode)
    backend.runs = 0
    with OperatorCounter() as first:
        loss = forward(model, 48)
    assert (backend.runs, first.attention) == (GRAPHS * NUM_LAYERS, NUM_LAYERS)
    with OperatorCounter() as second:
        loss.backward()
    assert backend.runs == GRAPHS * (NUM_LAYERS + ac_layers)
    assert second.attention == (0 if ac_mode == "selective" else ac_layers)


def test_evaluation_has_graphs_of_its_own(warm: Any) -> None:
    model, parts, backend, _ = warm
    set_ac_layers(parts.layers, NUM_LAYERS, "selective")
    plain, _ = tiny_decoder()
    for num_tokens in (48, 96):
        with torch.no_grad():
            assert forward(model, num_tokens).item() == pytest.approx(forward(plain, num_tokens).item(), rel=1e-6)
        assert backend.made == ALL_GRAPHS + GRAPHS


@pytest.mark.slow
def test_inductor_trains_as_without_graphs() -> None:
    model, parts = compiled_decoder("inductor")
    for num_tokens in (40, 256):
        assert_equal_training(model, parts, num_tokens)


def test_names_and_classes_stay() -> None:
    plain, _ = tiny_decoder()
    model, parts = compiled_decoder("aot_eager")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(isinstance(layer, TransformerSelfAttentionLayer) for layer in parts.layers)
    assert len({type(layer) for layer in parts.layers}) == 1


GROUPS = [
    {"name": "short", "pack_len": 256, "ac_layers": 2, "ac_mode": "selective"},
    {"name": "middle", "pack_len": 512, "cp_degree": 2},
    {"name": "long", "pack_len": 1024, "cp_degree": 2, "ac_layers": 2},
    {"name": "longest", "pack_len": 2048, "cp_degree": 2, "ac_layers": 3, "ac_mode": "selective"},
]


def graphs_job(cfg: Any, backend: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Give what was logged (on rank 0), and this rank's number of graphs after each step."""
    torch._dynamo.reset()
    counters.clear()
    os.environ["TORCH_COMPILE_BACKEND"] = backend
    try:
        recipe = HBPFullFinetuneRecipeDistributed(cfg)
        recipe.setup(cfg)
        log, graphs = recipe._log, []

        def count(*args: Any) -> None:
            log(*args)
            graphs.append(counters["stats"]["unique_graphs"])

        recipe._log = count  # type: ignore[method-assign]
        recipe.train()
    finally:
        del os.environ["TORCH_COMPILE_BACKEND"]
        torch._dynamo.reset()
    return recipe._metric_logger.steps if recipe.rank == 0 else [], graphs


def train_both_ways(pool: RankPool, directory: Path, backend: str, **changes: Any) -> list[list[dict[str, Any]]]:
    """Train by graphs and without them; check the graphs."""
    lengths = [*mixed_lengths(120, 1024, seed=1), *range(1100, 2000, 50)]
    logged = []
    for compiled in (True, False):
        results = pool.run(graphs_job, recipe_config(directory, lengths, GROUPS, compile=compiled, **changes), backend)
        logged.append(results[0][0])
        for _, graphs in results:
            if compiled:
                # DTensor's all-to-all for gloo gives rank 1 a later part of what it gathered: a place in memory is guarded too.
                # And the loss head has one, for all lengths.
                assert graphs[-1] <= ALL_GRAPHS + 1 + 1
                assert set(graphs[4:]) == {graphs[-1]}, "the first steps see two lengths, and all groups come after them too"
            else:
                assert set(graphs) == {0}
    assert {(step["cp_degree"], step["pack_len"]) for step in logged[0][4:]} == {(1, 256), (2, 512), (2, 1024), (2, 2048)}
    return logged


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_recipe_trains_all_groups_by_the_same_graphs(ranks: Callable[[int], RankPool], tmp_path: Path, backend: str) -> None:
    by_graphs, plain = train_both_ways(ranks(2), tmp_path, backend)
    assert len(by_graphs) == len(plain) > 12
    for left, right in zip(by_graphs, plain, strict=True):
        for name in ("loss", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-5), f"{name} at step {left['step']}"


@pytest.mark.slow
def test_graphs_compute_in_bf16_beside_weights_in_fp32(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    by_graphs, plain = train_both_ways(ranks(2), tmp_path, "aot_eager", compute_dtype="bf16")
    for left, right in zip(by_graphs, plain, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-2), f"loss at step {left['step']}"
