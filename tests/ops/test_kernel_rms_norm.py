import in_interpreter  # first
import pytest
import torch

from pangu.ops.rms_norm import rms_norm_reference, rms_norm_triton

EPSILON = 1e-5


def reference(x, weight, *residual):
    return sum(residual, start=rms_norm_reference(x, weight, EPSILON))


def kernel(x, weight, *residual):
    return rms_norm_triton(x, weight, EPSILON, *residual)


@in_interpreter.DTYPES
@pytest.mark.parametrize("added", [False, True], ids=("alone", "residual"))
@pytest.mark.parametrize("shape", [(1, 8), (37, 3, 24), (3, 4100)])
def test_norms_and_gradients_follow_the_reference(shape, added, dtype):
    """Rows in several dimensions, fewer and more than one tile has, one wider than that; more
    tiles than programs, so that a program sums over several."""
    inputs = [torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)]
    if added:
        inputs.append(torch.randn(shape).to(dtype))
    in_interpreter.follows(kernel, reference, inputs, dtype=dtype)


def test_programs_share_rows_and_their_sums_are_added():
    x, weight = torch.randn(2000, 40), torch.randn(40)
    in_interpreter.follows(kernel, reference, (x, weight), dtype=torch.float32)


def test_what_no_kernel_takes_is_left_to_plain_operations():
    x, weight = torch.randn(2, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(kernel(x, weight, x), reference(x, weight, x), rtol=1e-14, atol=0)
    wide = torch.randn(1, 16640)
    torch.testing.assert_close(kernel(wide, wide[0]), reference(wide, wide[0]))


def test_no_rows_are_nothing():
    x, weight = torch.empty(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    kernel(x, weight).sum().backward()
    assert x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(8))
