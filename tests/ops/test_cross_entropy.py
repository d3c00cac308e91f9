"""The cross-entropy that overwrites its logits, against torch's."""

from __future__ import annotations

import pytest
import torch

from pangu.ops.cross_entropy import cross_entropy, cross_entropy_reference


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 3), (37, 50_000), (300, 1024)])
def test_equals_torch(rows: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    weight = 3 * torch.randn(vocabulary, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    mask = torch.rand(rows, generator=generator, dtype=torch.float64)
    results = []
    for function in (cross_entropy, cross_entropy_reference):
        x = hidden.clone().requires_grad_()
        losses = function(x @ weight.t(), labels)
        (losses * mask).sum().backward()
        results.append((losses.detach(), x.grad))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


def test_logits_far_apart_stay_finite() -> None:
    logits = torch.tensor([[0.0, -2e4, 3e4], [1e30, 0.0, 0.0]])
    losses = cross_entropy(logits.clone(), torch.tensor([1, 0]))
    assert losses.tolist() == [5e4, 0.0]
    assert cross_entropy(torch.full((1, 4), float("nan")), torch.tensor([2])).isnan().all()


def test_backward_needs_no_further_tensor_of_the_logits_size() -> None:
    logits = torch.randn(64, 128, requires_grad=True)
    used = logits * 1.0
    (gradient,) = torch.autograd.grad(cross_entropy(used, torch.zeros(64, dtype=int)).sum(), used)
    assert gradient.data_ptr() == used.data_ptr()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(64), rtol=0, atol=1e-5)
