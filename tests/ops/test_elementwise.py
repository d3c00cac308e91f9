from dataclasses import replace

import pytest
import torch

from pangu import backends
from pangu.ops.rms_norm import rms_norm, rms_norm_reference
from pangu.ops.swiglu import swiglu, swiglu_reference


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [1, 15, 2**18])
def test_swiglu_follows_its_reference(weighted, block, monkeypatch):
    monkeypatch.setattr(backends, "_current", replace(backends.current(), block_elements=block))
    x = torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, dtype=torch.float64, requires_grad=True) if weighted else None
    inputs = (x, weights) if weighted else (x,)
    upstream = torch.randn(7, 5, dtype=torch.float64)
    y, expected = swiglu(x, weights), swiglu_reference(x, weights)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        rtol=1e-13,
        atol=1e-13,
    )


def test_swiglu_value():
    silu_of_2 = 2 / (1 + torch.exp(torch.tensor(-2.0)))
    y = swiglu(torch.tensor([[2.0, 3.0]]), torch.tensor([0.5]))
    torch.testing.assert_close(y, (silu_of_2 * 3 * 0.5).reshape(1, 1))


def test_swiglu_keeps_bfloat16_and_multiplies_in_float32():
    x = torch.randn(64, 32).bfloat16()
    weights = torch.rand(64)
    y = swiglu(x, weights)
    gate, up = x.chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * up).float() * weights[:, None]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0, atol=0)


def test_rms_norm_follows_its_reference():
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    y, expected = rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)
    torch.testing.assert_close(y, expected)
    assert y[0, 0, 3].item() == pytest.approx(
        (x[0, 0, 3] * weight[3] / (x[0, 0].square().mean() + 1e-5).sqrt()).item()
    )
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), (x, weight)),
        torch.autograd.grad(expected.square().sum(), (x, weight)),
    )
