import pytest
import torch

from pangu.ops.grouped_matmul import Fused, Loop, grouped_matmul

COUNTS = {
    "even": [4, 4, 4, 4],
    "empty groups": [0, 9, 0, 7],
    "one row": [1, 0, 15, 0],
    "collapse": [0, 0, 16, 0],
    "no rows": [0, 0, 0, 0],
}


# Fused.fits refuses no rows.
CASES = [(c, k) for c in COUNTS.values() for k in (None, Loop, Fused) if k is not Fused or sum(c)]


@pytest.mark.parametrize(("counts", "kernels"), CASES)
def test_values_and_gradients_are_those_of_one_product_per_group(counts, kernels):
    dtype = torch.float32 if kernels is Fused else torch.float64
    rows = sum(counts)
    x = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    w = torch.randn(4, 8, 12, dtype=dtype, requires_grad=True)
    upstream = torch.randn(rows, 12, dtype=dtype)

    y = grouped_matmul(x, w, torch.tensor(counts), kernels)
    grads = torch.autograd.grad(y, (x, w), upstream)

    expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    expected = torch.einsum("ni,nio->no", x, w[expert])
    expected_grads = torch.autograd.grad(expected, (x, w), upstream)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads, expected_grads, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", [Loop, Fused])
def test_an_expanded_gradient_is_taken(kernels):
    x = torch.randn(5, 4, requires_grad=True)
    w = torch.randn(2, 4, 8, requires_grad=True)
    grouped_matmul(x, w, torch.tensor([2, 3]), kernels).sum().backward()
    torch.testing.assert_close(w.grad[0], x[:2].sum(0)[:, None].expand(4, 8).detach())


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((2, 8, 4), torch.float32, True),
        ((2, 8, 6), torch.float32, False),
        ((2, 8, 4), torch.bfloat16, False),
        ((2, 8, 16), torch.bfloat16, True),
        ((2, 8, 4), torch.float64, False),
    ],
)
def test_the_fused_product_is_taken_only_where_it_fits(shape, dtype, fits):
    assert Fused.fits(torch.empty(3, 8, dtype=dtype), torch.empty(shape, dtype=dtype)) == fits
