import pytest
import torch
import torch.nn.functional as F

from hbp_tune.components.parallel import loss_head
from hbp_tune.components.parallel.loss_head import weighted_cross_entropy


def make(num_tokens: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, num_tokens, 6, generator=generator).requires_grad_()
    weight = torch.randn(20, 6, generator=generator).requires_grad_()
    labels = torch.randint(0, 20, (1, num_tokens), generator=generator)
    labels[0, ::3] = -100
    return hidden, weight, labels, torch.rand(1, num_tokens, generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 10, 100])
def test_chunks_equal_all_logits_at_once(monkeypatch: pytest.MonkeyPatch, chunk_tokens: int) -> None:
    monkeypatch.setattr(loss_head, "_CHUNK_BYTES", 4 * 20 * chunk_tokens)
    hidden, weight, labels, loss_weights = make()
    got = weighted_cross_entropy(hidden, weight, labels, loss_weights)
    logits = hidden[0] @ weight.T
    want = (F.cross_entropy(logits, labels[0], ignore_index=-100, reduction="none") * loss_weights[0]).sum()
    torch.testing.assert_close(got, want)
    for left, right in zip(torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True):
        torch.testing.assert_close(left, right)


def test_logits_of_one_chunk_only_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = F.linear
    monkeypatch.setattr(loss_head, "_CHUNK_BYTES", 4 * 20 * 4)
    monkeypatch.setattr(F, "linear", lambda h, w: (seen.append(len(h)), plain(h, w))[1])
    hidden, weight, labels, loss_weights = make()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        weighted_cross_entropy(hidden, weight, labels, loss_weights)
    assert seen == [4, 4, 2]
    assert not any(x.shape[-1] == 20 and x.ndim == 2 for x in saved), "logits are kept for the backward"


def test_a_shard_without_labels_gives_a_zero_that_keeps_the_graph() -> None:
    hidden, weight, labels, loss_weights = make()
    loss = weighted_cross_entropy(hidden, weight, torch.full_like(labels, -100), torch.zeros_like(loss_weights))
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_bf16_hidden_states_are_summed_in_fp32() -> None:
    hidden, weight, labels, loss_weights = make()
    loss = weighted_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, loss_weights)
    assert loss.dtype == torch.float32
