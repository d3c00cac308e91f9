import in_interpreter  # first
import pytest
import torch

from pangu.ops.kernels import swiglu
from pangu.ops.swiglu import swiglu_reference, swiglu_triton


@in_interpreter.DTYPES
@pytest.mark.parametrize("weighted", [True, False], ids=("weighted", "plain"))
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (67, 24), (5, 1100)])
def test_swiglu_and_its_gradients_follow_the_reference(rows, width, weighted, dtype):
    x = torch.randn(rows, 2 * width).to(dtype)
    inputs = (x, torch.rand(rows)) if weighted else (x,)
    in_interpreter.follows(swiglu_triton, swiglu_reference, inputs, dtype=dtype)


def test_large_gates_are_finite_and_no_rows_are_nothing():
    x = torch.tensor([[-100.0, 100.0, 1.0, 1.0]], requires_grad=True)
    y = swiglu_triton(x, None)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([[0.0, 100.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 1.0, 0.0, 100.0]]))
    empty, weights = torch.empty(0, 8, requires_grad=True), torch.empty(0, requires_grad=True)
    swiglu_triton(empty, weights).sum().backward()
    assert empty.grad.shape == (0, 8)


def test_activations_of_several_dimensions_and_strides_are_rows():
    x = torch.randn(3, 2, 16)
    torch.testing.assert_close(swiglu_triton(x), swiglu_reference(x))
    turned = x.transpose(0, 1)
    torch.testing.assert_close(swiglu_triton(turned), swiglu_reference(turned))


def test_float64_is_left_to_plain_operations(monkeypatch):
    monkeypatch.setattr(swiglu, "swiglu", None)
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(swiglu_triton(x), swiglu_reference(x))
