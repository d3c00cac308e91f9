import in_interpreter  # first
import pytest
import torch

from pangu.ops.weight_gradient import weight_gradient_reference, weight_gradient_triton

# Off every tile, on it, over it; rows of a group from none to more than two blocks of them.
COUNTS = {"ragged": [1, 0, 37, 70], "collapse": [0, 0, 129, 0], "none": [0, 0, 0, 0]}


@in_interpreter.DTYPES
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (128, 136)])
def test_gradients_are_added_in_float32(counts, inputs, outputs, dtype):
    """As by two micro-batches, to sums that hold something; nothing is rounded to x's dtype."""
    total = torch.randn(4, inputs, outputs)
    expected, counts = total.double(), torch.tensor(counts)
    for _ in range(2):
        x = torch.randn(int(counts.sum()), inputs).to(dtype)
        y = torch.randn(int(counts.sum()), outputs).to(dtype)
        assert weight_gradient_triton(total, x, y, counts)
        expected = weight_gradient_reference(expected, x, y, counts)
    torch.testing.assert_close(
        total.double(), expected, rtol=0, atol=3e-6 * float(expected.abs().max())
    )


def test_rows_behind_the_last_group_and_strides_are_taken():
    x, y = torch.randn(24, 2, 8)[:, 0], torch.randn(16, 24).t()
    total, counts = torch.zeros(2, 8, 16), torch.tensor([3, 8])
    assert weight_gradient_triton(total, x, y, counts)
    expected = weight_gradient_reference(torch.zeros(2, 8, 16), x[:11], y[:11], counts)
    torch.testing.assert_close(total, expected)


def test_other_precisions_are_left_to_the_grouped_product():
    x, y, counts = torch.ones(2, 8), torch.ones(2, 8), torch.tensor([2])
    for total, rows in ((x.new_zeros(1, 8, 8).double(), x), (x.new_zeros(1, 8, 8), x.double())):
        assert not weight_gradient_triton(total, rows, y.to(rows.dtype), counts)
        assert total.count_nonzero() == 0
