import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hbp_tune.components.parallel.attention import sdpa_per_document, select_attention, varlen_flash


def make(
    num_tokens: int, *, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_tokens, h, 8, generator=generator, dtype=dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def dense(q: Tensor, k: Tensor, v: Tensor, doc_lens: tuple[int, ...]) -> Tensor:
    """Plain attention under one dense mask."""
    doc_ids = torch.repeat_interleave(torch.arange(len(doc_lens)), torch.tensor(doc_lens))
    mask = (doc_ids[:, None] == doc_ids[None]) & torch.ones(len(doc_ids), len(doc_ids), dtype=torch.bool).tril()
    repeats = q.shape[1] // k.shape[1]
    q, k, v = q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)


def cumulative(doc_lens: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *doc_lens]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("doc_lens", [(12,), (1, 11), (5, 1, 1, 5), (3, 4, 5)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_documents_equal_a_dense_mask_forward_and_backward(doc_lens: tuple[int, ...], kv_heads: int) -> None:
    inputs = make(12, kv_heads=kv_heads)
    got = sdpa_per_document(*inputs, cumulative(doc_lens), doc_lens)
    want = dense(*inputs, doc_lens)
    torch.testing.assert_close(got, want)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    for left, right in zip(
        torch.autograd.grad((got * weights).sum(), inputs), torch.autograd.grad((want * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(left, right)


def test_changing_one_document_changes_no_other() -> None:
    doc_lens = (4, 5, 3)
    q, k, v = (x.detach() for x in make(12))
    before = sdpa_per_document(q, k, v, cumulative(doc_lens), doc_lens)
    for x in (q, k, v):
        x[4:9] += 1.0
    after = sdpa_per_document(q, k, v, cumulative(doc_lens), doc_lens)
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[4:9], after[4:9])


def test_choice_by_device_and_dtype() -> None:
    assert select_attention(torch.device("cpu"), torch.bfloat16) is sdpa_per_document
    assert select_attention(torch.device("cuda"), torch.bfloat16) is varlen_flash
    assert select_attention(torch.device("cuda"), torch.float32) is sdpa_per_document


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_varlen_kernel_equals_the_reference_in_bf16(kv_heads: int) -> None:
    doc_lens = (100, 1, 155, 256)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(512, h, 64, generator=generator).cuda().requires_grad_() for h in (4, kv_heads, kv_heads)]
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs]
    cu_seqlens = cumulative(doc_lens).cuda()
    want = sdpa_per_document(*inputs, cu_seqlens, doc_lens)
    got = varlen_flash(*halves, cu_seqlens, doc_lens)
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)
    for left, right in zip(torch.autograd.grad(got.sum(), halves), torch.autograd.grad(want.sum(), inputs), strict=True):
        assert (left.float() - right).norm() <= 2e-2 * right.norm()
