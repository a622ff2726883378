"""Loss heads against all logits at once."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hbp_tune.demo.model import TinyLlama, build
from hbp_tune.errors import ConfigError
from hbp_tune.models import adapt_decoder, separate_units
from hbp_tune.parallel import (
    ForwardGradientHead,
    LigerHead,
    RecomputedHead,
    TokenLossHead,
    apply_fsdp,
    build_fsdp_mesh,
    loss_head,
)
from hbp_tune.parallel.loss_head import LossHead
from hbp_tune.planning import EpochPlan
from tests.helpers import mixed_lengths, recipe_config, run_recipe_job
from tests.ranks import RankError, RankPool

VOCAB_SIZE, EMBED_DIM = 20, 6
CHUNKED = [ForwardGradientHead, RecomputedHead]


def make(num_tokens: int = 10, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Draw hidden states, weight, labels of which about half are masked, and uneven loss weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, num_tokens, EMBED_DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB_SIZE, EMBED_DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB_SIZE, (1, num_tokens), generator=generator)
    masked = torch.rand(1, num_tokens, generator=generator) < 0.5
    loss_weights = torch.rand(1, num_tokens, generator=generator)
    return [hidden, weight, labels.masked_fill(masked, -100), loss_weights.masked_fill(masked, 0)]


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
    logits = hidden[0] @ weight.T
    losses = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[0], reduction="none")
    return (losses * loss_weights[0]).sum()


def loss_and_gradients(head: Callable[..., Tensor], inputs: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    loss = head(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss * scale, inputs[:2])]


@pytest.mark.parametrize("head_type", CHUNKED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 10, 100, None])
def test_chunks_equal_all_logits_at_once(
    head_type: Callable[..., LossHead], dtype: torch.dtype, tolerance: float, chunk_tokens: int | None
) -> None:
    for seed in range(5):
        inputs = make(seed=seed, dtype=dtype)
        got = loss_and_gradients(head_type(chunk_tokens), inputs, scale=3.0)  # a power of two would hide where it is applied
        for left, right in zip(got, loss_and_gradients(all_logits, inputs, scale=3.0), strict=True):
            assert left.dtype == dtype
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head_type", CHUNKED)
def test_extreme_logits_stay_finite(head_type: Callable[..., LossHead]) -> None:
    hidden, weight, labels, loss_weights = make(dtype=torch.float32)
    inputs = [(hidden * 1e4).detach().requires_grad_(), weight, labels, loss_weights]
    for left, right in zip(loss_and_gradients(head_type(3), inputs), loss_and_gradients(all_logits, inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [16, 64, 256])
def test_bf16_gradients_are_as_good_as_those_of_all_logits_at_once(chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(1, 256, 64, generator=generator)).bfloat16().requires_grad_()
    weight = (torch.randn(512, 64, generator=generator) / 4).bfloat16().requires_grad_()
    rest = [torch.randint(0, 512, (1, 256), generator=generator), torch.rand(1, 256, generator=generator)]
    exact = loss_and_gradients(
        all_logits, [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), *rest]
    )
    got = loss_and_gradients(ForwardGradientHead(chunk_tokens), [hidden, weight, *rest])
    plain = loss_and_gradients(all_logits, [hidden, weight, *rest])
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for left, right, truth in zip(got, plain, exact, strict=True):
        # One part in a thousand for the loss, whose own error is nearly nothing.
        assert (left - truth).norm() <= 1.001 * (right - truth).norm() + 1e-3 * (truth.norm() if left.ndim == 0 else 0)


@pytest.mark.parametrize("head_type", CHUNKED)
def test_a_shard_without_labels_gives_a_zero_that_keeps_the_graph(head_type: Callable[..., LossHead]) -> None:
    hidden, weight, labels, loss_weights = make()
    loss = head_type(4)(hidden, weight, torch.full_like(labels, -100), torch.zeros_like(loss_weights))
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("head_type", CHUNKED)
def test_masked_tokens_do_not_count_whatever_they_weigh(head_type: Callable[..., LossHead]) -> None:
    hidden, weight, labels, loss_weights = make()
    inputs = [hidden, weight, labels, loss_weights.masked_fill(labels == -100, 5.0)]
    for left, right in zip(
        loss_and_gradients(head_type(3), inputs),
        loss_and_gradients(all_logits, [hidden, weight, labels, loss_weights]),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(monkeypatch: pytest.MonkeyPatch, frozen: int) -> None:
    inputs = make()
    want = loss_and_gradients(all_logits, inputs)[2 - frozen]
    inputs[frozen].requires_grad_(False)
    products = count_products(monkeypatch)
    loss = ForwardGradientHead(5)(*inputs)
    assert products == {"logits": 2, "hidden": 2 * frozen, "weight": 2 * (1 - frozen)}
    loss.backward()
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[1 - frozen].grad, want)


def count_products(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the matrix products of the forward by what they make."""
    counts = {"logits": 0, "hidden": 0, "weight": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(F, "linear", counted("logits", F.linear))
    monkeypatch.setattr(torch, "mm", counted("hidden", torch.mm))
    monkeypatch.setattr(loss_head, "_add_product", counted("weight", loss_head._add_product))
    return counts


def test_without_gradients_only_the_loss_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make()
    want = all_logits(*inputs)
    products = count_products(monkeypatch)
    with torch.no_grad():
        loss = ForwardGradientHead(5)(*inputs)
    assert products == {"logits": 2, "hidden": 0, "weight": 0}
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want.detach())


def test_a_second_derivative_and_a_second_backward_are_refused() -> None:
    inputs = make()
    loss = ForwardGradientHead(4)(*inputs)
    with pytest.raises(RuntimeError, match="can be differentiated once only; set loss_head to RecomputedHead"):
        torch.autograd.grad(loss, inputs[0], create_graph=True)
    torch.autograd.grad(loss, inputs[0], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs[0])


class LogitsAlive(TorchDispatchMode):
    """Notes the most bytes of tensors over the whole vocabulary that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 2 and VOCAB_SIZE in out.shape and EMBED_DIM not in out.shape:
            storage = out.untyped_storage()
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: (ref, nbytes) for key, (ref, nbytes) in self._storages.items() if not ref.expired()}
        self.peak_bytes = max(self.peak_bytes, sum(nbytes for _, nbytes in self._storages.values()))
        return out


@pytest.mark.parametrize(
    ("head_type", "dtype", "chunks"),
    # bf16: the logits before they are widened. Recomputed: logits, log-softmax and their gradient.
    [(ForwardGradientHead, torch.float32, 1), (ForwardGradientHead, torch.bfloat16, 1.5), (RecomputedHead, torch.float32, 3)],
)
def test_logits_of_one_chunk_only_are_alive(head_type: Callable[..., LossHead], dtype: torch.dtype, chunks: float) -> None:
    inputs = make(num_tokens=40, dtype=dtype)
    with LogitsAlive() as alive:
        head_type(4)(*inputs).backward()
    assert 0 < alive.peak_bytes <= chunks * 4 * VOCAB_SIZE * 4
    with LogitsAlive() as alive:
        all_logits(*inputs).backward()
    assert alive.peak_bytes >= 2 * 40 * VOCAB_SIZE * 4, "all logits at once should be seen"


def test_chunks_are_even_and_fit_the_weight() -> None:
    assert loss_head._chunk_sizes(10, 4) == [3, 3, 4]
    for num_tokens in range(1, 60):
        for most in range(1, 12):
            sizes = loss_head._chunk_sizes(num_tokens, most)
            assert sum(sizes) == num_tokens
            assert len(sizes) == -(-num_tokens // most)
            assert max(sizes) <= most
            assert max(sizes) - min(sizes) <= 1
    with torch.device("meta"):
        assert loss_head._fitting_chunk_tokens(torch.empty(128256, 4096)) == 2048, "half of the weight's own elements"
        assert loss_head._fitting_chunk_tokens(torch.empty(32768, 64)) == 256
    with pytest.raises(ConfigError, match=r"loss_head.chunk_tokens=0 must be at least 1; leave it out"):
        RecomputedHead(0)


def decoder_without_layers(head: LossHead, *, tied: bool) -> nn.Module:
    """Build a decoder that goes from embeddings to the loss at once, in fp64: norms of torchtune would round to fp32."""
    shape = TinyLlama(
        vocab_size=VOCAB_SIZE, num_layers=1, num_heads=2, num_kv_heads=1, embed_dim=8, intermediate_dim=8, tied=tied
    )
    torch.manual_seed(0)
    model = build(shape)
    adapt_decoder(model, loss_head=head)
    model.layers, model.norm = nn.ModuleList(), nn.Identity()
    return model.double()


def embedded_batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Draw tokens, labels and loss weights of four packs; the last one has no label."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, VOCAB_SIZE, (2, 4, 1, 12), generator=generator)
    labels[:, :, ::3] = -100
    labels[3] = -100
    return list(zip(tokens, labels, torch.rand(4, 1, 12, generator=generator), strict=True))


def sharded_gradients_job(head: LossHead, tied: bool, names: list[str]) -> tuple[float, dict[str, Tensor]]:
    """Run two micro-steps of one pack a rank; give the loss of this rank and the gradients of the whole step."""
    model = decoder_without_layers(head, tied=tied)
    apply_fsdp(model, separate_units(model, names), build_fsdp_mesh("cpu"), compute_dtype=torch.float64)
    rank, loss_sum = torch.distributed.get_rank(), 0.0
    for micro_step in range(2):
        cast(Any, model).set_requires_gradient_sync(micro_step == 1)
        tokens, labels, loss_weights = embedded_batches()[2 * micro_step + rank]
        loss = model(tokens, mask=None, input_pos=None, labels=labels, loss_weights=loss_weights)
        (loss * 2).backward()
        loss_sum += loss.item()
    return loss_sum, {name: cast(DTensor, parameter.grad).full_tensor() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("head", [ForwardGradientHead(5), RecomputedHead(5)], ids=["forward gradient", "recomputed"])
@pytest.mark.parametrize(("tied", "names"), [(False, []), (False, ["tok_embeddings", "output"]), (True, [])])
def test_two_sharding_ranks_equal_one_process(
    ranks: Callable[[int], RankPool], head: LossHead, tied: bool, names: list[str]
) -> None:
    model: Any = decoder_without_layers(head, tied=tied)
    output = model.tok_embeddings.weight if tied else model.output.weight
    want = torch.stack([all_logits(model.tok_embeddings(tokens), output, *rest) for tokens, *rest in embedded_batches()]).sum()
    want.backward()  # of a tied weight: the embedding's gradient and the projection's
    results = ranks(2).run(sharded_gradients_job, head, tied, names)
    assert sum(loss for loss, _ in results) == pytest.approx(want.item(), rel=1e-12)
    for _, gradients in results:
        assert gradients.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-12)


def fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Stand in for liger-kernel's function of this signature, with the whole logits."""
    assert accum_dtype == torch.float32
    return F.cross_entropy(input @ weight.T, target, ignore_index=ignore_index, reduction=reduction)


@pytest.fixture
def fake_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("liger_kernel.transformers.functional")
    module.liger_fused_linear_cross_entropy = fused_linear_cross_entropy
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("fake_liger")
def test_liger_head_applies_the_common_weight() -> None:
    hidden, weight, labels, _ = make()
    common = torch.full_like(labels, 0.3, dtype=torch.float32).masked_fill(labels == -100, 0)
    inputs = [hidden, weight, labels, common]
    for left, right in zip(loss_and_gradients(LigerHead(), inputs), loss_and_gradients(all_logits, inputs), strict=True):
        torch.testing.assert_close(left, right)
    nothing = LigerHead()(hidden, weight, torch.full_like(labels, -100), torch.zeros_like(common))
    assert nothing.item() == 0.0
    assert nothing.requires_grad


@pytest.mark.usefixtures("fake_liger")
def test_liger_head_refuses_what_it_cannot_serve() -> None:
    packs = np.array([0, 0, 1, 1])
    with pytest.raises(ConfigError, match=r"LigerHead needs device=cuda, device is cpu; leave loss_head out"):
        LigerHead().check(torch.device("cpu"), np.ones(4), packs)
    with pytest.raises(
        ConfigError, match=r"those of pack 1 by 0.25 and 0.5; leave loss_head out, or set loss to hbp_tune.*AveTokenLoss"
    ):
        LigerHead().check(torch.device("cuda"), np.array([0.1, 0.1, 0.25, 0.5]), packs)
    LigerHead().check(torch.device("cuda"), np.array([0.1, 0.1, 0.5, 0.5]), packs)
    for head in (ForwardGradientHead(), RecomputedHead()):
        head.check(torch.device("cpu"), np.array([0.1, 0.2, 0.25, 0.5]), packs)


def test_liger_head_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ConfigError, match=r"LigerHead needs liger-kernel \(.*\); pip install 'hbp-tune\[liger\]', or leave"):
        LigerHead()


@pytest.mark.parametrize("chunk_tokens", [None, 1, 3, 100])
def test_token_losses_are_the_terms_of_the_sum(chunk_tokens: int | None) -> None:
    inputs = make(10)
    losses = TokenLossHead(chunk_tokens)(*inputs)
    logits = inputs[0][0] @ inputs[1].T
    want = F.cross_entropy(logits, inputs[2][0], reduction="none") * inputs[3][0]
    torch.testing.assert_close(losses, want[None].detach())
    assert not losses.requires_grad
    assert (losses[inputs[2] == -100] == 0).all()


def compiled_head(chunk_tokens: int | None = None, backend: str = "inductor") -> ForwardGradientHead:
    head = ForwardGradientHead(chunk_tokens)
    head.compile(backend)
    return head


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_compiled_head_gives_what_the_other_gives(backend: str, dtype: torch.dtype) -> None:
    hidden, weight, labels, loss_weights = make(50)
    labels[0, 7] = -100
    inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    results = [
        loss_and_gradients(head, [*inputs, labels, loss_weights]) for head in (compiled_head(7, backend), ForwardGradientHead(7))
    ]
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-6) * want.norm()


GROUPS = [{"name": "short", "pack_len": 128}, {"name": "long", "pack_len": 512, "cp_degree": 2}]


def recipe_losses(ranks: Callable[[int], RankPool], directory: Path, **changes: Any) -> list[float]:
    cfg = recipe_config(directory, mixed_lengths(60, 512, seed=7), GROUPS, max_steps=2, **changes)
    return [step["loss"] for step in ranks(2).run(run_recipe_job, cfg)[0]]


def test_a_recipe_takes_the_head_that_is_configured(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    default = recipe_losses(ranks, tmp_path / "default")
    other = {"_component_": "hbp_tune.components.RecomputedHead", "chunk_tokens": 7}
    assert recipe_losses(ranks, tmp_path / "other", loss_head=other) == pytest.approx(default, rel=1e-6)
    with pytest.raises(RankError, match=r"LigerHead needs (liger-kernel|device=cuda)"):
        recipe_losses(ranks, tmp_path / "liger", loss_head={"_component_": "hbp_tune.components.LigerHead"})


class OnlyEqualWeights(ForwardGradientHead):
    """Refuses the weights that `LigerHead` refuses, on every device."""

    def check(self, device: torch.device, document_weights: Any, pack_of_sample: Any) -> None:
        LigerHead.check(cast(LigerHead, self), torch.device("cuda"), document_weights, pack_of_sample)


class BySample:
    """Weighs every sample, not every target, the same."""

    def document_weights(self, plan: EpochPlan, num_targets: Any) -> Any:
        return 1.0 / np.maximum(num_targets[plan.sample_ids], 1)


def test_a_recipe_checks_the_weights_of_its_plan(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    head = {"_component_": f"{__name__}.OnlyEqualWeights"}
    assert len(recipe_losses(ranks, tmp_path / "by token", loss_head=head)) == 2
    with pytest.raises(RankError, match=r"gives all targets of a pack one weight, but the loss weighs those of pack \d+ by"):
        recipe_losses(ranks, tmp_path / "by sample", loss_head=head, loss={"_component_": f"{__name__}.BySample"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_type", [ForwardGradientHead, compiled_head, RecomputedHead, LigerHead])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_gradients_on_a_gpu(head_type: Callable[..., LossHead], dtype: torch.dtype, tolerance: float) -> None:
    if head_type is LigerHead:
        pytest.importorskip("liger_kernel")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 1000, 256, generator=generator), torch.randn(4096, 256, generator=generator) / 8
    labels = torch.randint(0, 4096, (1, 1000), generator=generator)
    labels[0, ::3] = -100
    rest = [labels.cuda(), torch.full((1, 1000), 1e-3).masked_fill(labels == -100, 0).cuda()]
    inputs = [x.cuda().to(dtype).requires_grad_() for x in (hidden, weight)]
    exact = loss_and_gradients(all_logits, [*(x.detach().double().requires_grad_() for x in inputs), *rest])
    for left, right in zip(loss_and_gradients(head_type(), [*inputs, *rest]), exact, strict=True):
        assert (left - right).norm() <= tolerance * right.norm()
