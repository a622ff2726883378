import pytest
import torch
from torch import Tensor, nn

from hbp_tune.components.parallel.activation_checkpoint import make_checkpointable, set_ac_layers


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x)) * scale


def run(layers: list[Layer], ac_layers: int) -> tuple[list[int], list[Tensor]]:
    set_ac_layers(layers, ac_layers)
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


@pytest.mark.parametrize("ac_layers", [0, 1, 3, 4])
def test_exactly_the_first_layers_recompute(layers: list[Layer], ac_layers: int) -> None:
    calls, _ = run(layers, ac_layers)
    assert calls == [2] * ac_layers + [1] * (4 - ac_layers)


def test_gradients_are_the_same_and_switching_goes_both_ways(layers: list[Layer]) -> None:
    _, plain = run(layers, 0)
    for ac_layers in (4, 0, 2):
        _, grads = run(layers, ac_layers)
        assert all(torch.equal(left, right) for left, right in zip(grads, plain, strict=True))


def test_parameter_names_stay_clean(layers: list[Layer]) -> None:
    assert [name for name, _ in layers[0].named_parameters()] == ["linear.weight", "linear.bias"]
    assert isinstance(layers[0], Layer)


def test_nothing_is_recomputed_without_gradients(layers: list[Layer]) -> None:
    set_ac_layers(layers, 4)
    with torch.no_grad():
        layers[0](torch.ones(2, 4))
    assert layers[0].calls == 1
