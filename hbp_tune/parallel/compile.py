"""torch.compile of each layer, once for all layers and all pack lengths."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic


def compile_layers(layers: Sequence[nn.Module], *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the forward of each layer; call before `make_checkpointable` and FSDP.

    Inside the checkpoint, so that switching it compiles nothing anew; around it, torch would run recomputed layers eagerly.
    Before FSDP, so that no graph holds the gathering of weights. The layer's class is replaced by a subclass made on the fly,
    one per class: guards name the class, so that equal layers share their graphs. A torchtune layer has four, two of which are
    made anew at the second length, and serve all lengths from then on.

    Args:
        layers: take and give ``[1, local_len, embed_dim]``; all tensors among the arguments have tokens in dimension 1.
        backend: of `torch.compile`.
    """
    compiled: dict[type[nn.Module], type[nn.Module]] = {}
    for layer in layers:
        cls = type(layer)
        if cls not in compiled:
            compiled[cls] = _compiled(cls, backend)
        layer.__class__ = compiled[cls]


def between_graphs(*, token_dim: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Let a hook of the layers run as it is, between the graph that gives its arguments and the one that takes its result.

    For what must not be compiled in: meshes that change with the group, lists on the host that change with the pack. The
    result's number of tokens is marked as changing too; its layout should never change.

    Args:
        token_dim: of the tensor that the hook gives.
    """

    def decorate(hook: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(hook)
        def run(*args: Any, **kwargs: Any) -> Tensor:
            output = hook(*args, **kwargs)
            maybe_mark_dynamic(output, token_dim)
            return output

        return cast(Callable[..., Tensor], torch.compiler.disable(run))

    return decorate


def _compiled(cls: type[nn.Module], backend: str | Callable[..., Any]) -> type[nn.Module]:
    graphs = torch.compile(cls.forward, backend=backend)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            # By hand, for dynamic=True lets heads and widths vary as well, and takes a length that is the width for the width.
            if isinstance(value, Tensor):
                maybe_mark_dynamic(value, 1)
        return graphs(self, *args, **kwargs)

    return type(f"Compiled{cls.__name__}", (cls,), {"forward": forward})
