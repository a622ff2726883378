import importlib.machinery
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hbp_tune.data.batches.batch import Spans
from hbp_tune.errors import ConfigError
from hbp_tune.parallel import attention
from hbp_tune.parallel.attention import (
    Attention,
    attend_by_length,
    flash_attention,
    sdpa_per_document,
    select_attention,
    varlen_attention,
)
from hbp_tune.planning import CpDegrees
from tests.parallel.packs import dense, qkv, rank_view, spans_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("doc_lens", [(12,), (1, 11), (5, 1, 1, 5), (3, 4, 5)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_documents_equal_a_dense_mask_forward_and_backward(doc_lens: tuple[int, ...], kv_heads: int) -> None:
    inputs = qkv(12, 4, kv_heads)
    got = sdpa_per_document(*inputs, spans_of(doc_lens))
    want = dense(*inputs, doc_lens)
    torch.testing.assert_close(got, want)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    for left, right in zip(
        torch.autograd.grad((got * weights).sum(), inputs), torch.autograd.grad((want * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(left, right)


def attend_part(kernel: Attention, inputs: list[Tensor], doc_lens: tuple[int, ...], num_parts: int, index: int) -> Tensor:
    """Attend with one part's queries to its gathered keys, as all-gather-KV does."""
    degrees = CpDegrees(gather=num_parts)
    padded = sum(doc_lens)
    own = [rank_view(doc_lens, padded, degrees, part)[0] for part in range(num_parts)]
    rows, spans = rank_view(doc_lens, padded, degrees, index)
    held = torch.cat([*(part[: spans.gathered_len] for part in own), rows])
    keys = rows if spans.key_rows is None else held[spans.key_rows]
    q, k, v = inputs
    device = q.device
    return kernel(q[rows.to(device)], k[keys.to(device)], v[keys.to(device)], spans.map(lambda x: x.to(device)))


@pytest.mark.parametrize("doc_lens", [(16,), (11, 5), (1, 9, 2, 4), (1,) * 16])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_runs_with_more_keys_than_queries_equal_their_rows_of_the_dense_mask(
    monkeypatch: pytest.MonkeyPatch, doc_lens: tuple[int, ...], num_parts: int
) -> None:
    monkeypatch.setattr(attention, "_MASKED_QUERIES", 3)  # so that a run takes several masks
    inputs = qkv(16, 4, 2)
    want = dense(*inputs, doc_lens)
    for index in range(num_parts):
        rows, _ = rank_view(doc_lens, 16, CpDegrees(gather=num_parts), index)
        torch.testing.assert_close(attend_part(sdpa_per_document, inputs, doc_lens, num_parts, index), want[rows])


def assert_no_leak(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> None:
    """Change rows 4 to 8, one of three documents: outputs and gradients of the others must stay as they are, bit for bit."""
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[4:9] += 1.0
    changed = [x.requires_grad_() for x in changed]
    before, after = kernel(*inputs), kernel(*changed)
    grads = zip(torch.autograd.grad(before.sum(), inputs), torch.autograd.grad(after.sum(), changed), strict=True)
    for left, right in [(before, after), *grads]:
        assert torch.equal(left[:4], right[:4])
        assert torch.equal(left[9:], right[9:])
    assert not torch.equal(before[4:9], after[4:9])


def test_changing_one_document_changes_no_other() -> None:
    assert_no_leak(lambda q, k, v: sdpa_per_document(q, k, v, spans_of((4, 5, 3))), qkv(12, 4, 2))


def by_length(shortest: int) -> Attention:
    """Attend over runs of so many tokens by themselves, each by SDPA in place of cuDNN, padded as for it."""

    def long(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert len(q) == len(k) >= shortest
        return sdpa_per_document(q, k, v, spans_of((len(q),)))

    def others(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        assert (len(q), len(k)) == (spans.cu_seqlens_q[-1], spans.cu_seqlens_k[-1])
        assert spans.cu_seqlens_q.diff().tolist() == list(spans.query_lens)
        assert spans.cu_seqlens_k.diff().tolist() == list(spans.key_lens)
        assert all(queries != keys or queries < shortest for queries, keys in zip(spans.query_lens, spans.key_lens, strict=True))
        return sdpa_per_document(q, k, v, spans)

    return lambda q, k, v, spans: attend_by_length(q, k, v, spans, long=long, others=others, shortest=shortest)


@pytest.mark.parametrize("doc_lens", [(12,), (1, 11), (5, 1, 1, 5), (1, 2, 5, 3, 1), (3, 3, 3, 3), (1,) * 12])
@pytest.mark.parametrize("shortest", [1, 3, 5, 99])
def test_long_documents_by_themselves_equal_a_dense_mask(doc_lens: tuple[int, ...], shortest: int) -> None:
    inputs = qkv(12, 4, 2)
    got, want = by_length(shortest)(*inputs, spans_of(doc_lens)), dense(*inputs, doc_lens)
    torch.testing.assert_close(got, want)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    for left, right in zip(
        torch.autograd.grad((got * weights).sum(), inputs), torch.autograd.grad((want * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("doc_lens", [(11, 5), (1, 9, 2, 4)])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_runs_with_gathered_keys_are_not_taken_for_long_documents(doc_lens: tuple[int, ...], num_parts: int) -> None:
    inputs = qkv(16, 4, 2)
    want = dense(*inputs, doc_lens)
    for index in range(num_parts):
        rows, _ = rank_view(doc_lens, 16, CpDegrees(gather=num_parts), index)
        torch.testing.assert_close(attend_part(by_length(2), inputs, doc_lens, num_parts, index), want[rows])


@pytest.mark.parametrize("num_tokens", [1, 1023, 1024, 1025])
def test_documents_are_padded_for_cudnn_where_no_query_looks(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backend: nullcontext())  # cuDNN needs a GPU: torch's own choice here
    inputs = qkv(num_tokens, 2, 1, head_dim=4)
    got, want = attention._cudnn_causal(*inputs), dense(*inputs, (num_tokens,))
    torch.testing.assert_close(got, want)
    for left, right in zip(
        torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(want.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(left, right)


def test_choice_by_device_and_dtype() -> None:
    kernel, why = select_attention("auto", CPU, torch.bfloat16)
    assert kernel is sdpa_per_document
    assert why == "attention: sdpa, one call a document (bfloat16 on cpu has no variable-length kernel)"
    kernel, why = select_attention("auto", CUDA, torch.bfloat16)
    assert kernel is varlen_attention
    assert why.startswith(f"attention: varlen, torch {torch.__version__}'s own flash kernel (bfloat16 on cuda")
    kernel, why = select_attention("auto", CUDA, torch.float32)
    assert kernel is sdpa_per_document
    assert "variable-length kernels want bf16, this is float32 on cuda" in why
    assert select_attention("sdpa", CUDA, torch.bfloat16) == (sdpa_per_document, "attention: sdpa, as configured")
    assert select_attention("varlen", CUDA, torch.bfloat16)[0] is varlen_attention


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("flex", CUDA, torch.bfloat16, r"attention='flex' is not a kernel; choose auto or one of cudnn, varlen, flash, sdpa"),
        ("varlen", CPU, torch.bfloat16, r"attention='varlen' runs in bf16 on CUDA, not bfloat16 on cpu; .*auto or sdpa"),
        ("cudnn", CPU, torch.bfloat16, r"attention='cudnn' runs in bf16 on CUDA, not bfloat16 on cpu; .*auto or sdpa"),
        ("cudnn", CUDA, torch.bfloat16, r"attention='cudnn' needs a torch with cuDNN; set attention to auto"),
        ("flash", CUDA, torch.float32, r"attention='flash' runs in bf16 on CUDA, not float32 on cuda"),
        ("flash", CUDA, torch.bfloat16, r"attention='flash' needs the flash-attn package: pip install 'hbp-tune\[flash\]'"),
    ],
)
def test_kernels_that_cannot_run_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, device: torch.device, dtype: torch.dtype, message: str
) -> None:
    monkeypatch.setattr(attention, "has_flash_attention", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        select_attention(name, device, dtype)


def test_an_old_torch_needs_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_varlen_attention", lambda: False)
    monkeypatch.setattr(attention, "has_flash_attention", lambda: False)
    with pytest.raises(ConfigError, match=r"needs torch 2.10 or newer \(this is .*\) or the flash-attn package: pip install"):
        select_attention("auto", CUDA, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"attention='varlen' needs torch 2.10 or newer"):
        select_attention("varlen", CUDA, torch.bfloat16)
    monkeypatch.setattr(attention, "has_flash_attention", lambda: True)
    monkeypatch.setattr(attention.importlib.metadata, "version", lambda name: "2.8.0")
    kernel, why = select_attention("auto", CUDA, torch.bfloat16)
    assert kernel is flash_attention
    assert "flash-attn 2.8.0 (torch" in why


def test_the_flash_attn_package_is_called_with_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package needs a GPU; a stand-in with its signature shows that our arguments mean what ours do."""
    module = ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False,
    ) -> Tensor:  # fmt: skip
        assert causal
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        spans = Spans(
            cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, query_lens=tuple(cu_q.diff().tolist()), key_lens=tuple(cu_k.diff().tolist())
        )
        return sdpa_per_document(q, k, v, spans)

    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    inputs = qkv(16, 4, 2)
    rows, _ = rank_view((11, 5), 16, CpDegrees(gather=2), 1)
    torch.testing.assert_close(attend_part(flash_attention, inputs, (11, 5), 2, 1), dense(*inputs, (11, 5))[rows])
    assert attention.has_flash_attention()


def cudnn_from_100(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    return attend_by_length(q, k, v, spans, long=attention._cudnn_causal, others=varlen_attention, shortest=100)


def gpu_kernels() -> list[Attention]:
    return [varlen_attention, cudnn_from_100, *([flash_attention] if attention.has_flash_attention() else [])]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernel", gpu_kernels())
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_kernels_equal_the_reference_in_bf16(kernel: Attention, kv_heads: int, num_parts: int) -> None:
    doc_lens = (100, 1, 155, 256)
    inputs = [x.detach().float().cuda().requires_grad_() for x in qkv(512, 4, kv_heads, head_dim=64)]
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs]
    for index in range(num_parts):
        want = attend_part(sdpa_per_document, inputs, doc_lens, num_parts, index)
        got = attend_part(kernel, halves, doc_lens, num_parts, index)
        torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)
        for left, right in zip(torch.autograd.grad(got.sum(), halves), torch.autograd.grad(want.sum(), inputs), strict=True):
            assert (left.float() - right).norm() <= 2e-2 * right.norm()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernel", gpu_kernels())
def test_kernels_do_not_leak_between_documents(kernel: Attention) -> None:
    inputs = [x.detach().bfloat16().cuda().requires_grad_() for x in qkv(12, 4, 2, head_dim=64)]
    spans = spans_of((4, 5, 3)).map(lambda x: x.cuda())
    assert_no_leak(lambda q, k, v: kernel(q, k, v, spans), inputs)
