import math

import in_interpreter  # first
import pytest
import torch

from pangu.ops.cross_entropy import cross_entropy_reference, cross_entropy_triton


def used_up(logits, labels):
    """The kernel on a copy."""
    return cross_entropy_triton(logits.clone(), labels)


@in_interpreter.DTYPES
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 3), (13, 130), (3, 9001)])
def test_losses_and_gradient_follow_torch(rows, vocabulary, dtype):
    labels = torch.randint(0, vocabulary, (rows,))
    in_interpreter.follows(
        lambda x: used_up(x, labels),
        lambda x: cross_entropy_reference(x, labels),
        ((3 * torch.randn(rows, vocabulary)).to(dtype),),
        dtype=dtype,
    )


def test_the_gradient_overwrites_the_logits_in_their_own_dtype():
    logits = torch.randn(5, 12).bfloat16().requires_grad_()
    used = logits * 1.0
    losses = cross_entropy_triton(used, torch.zeros(5, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(losses.sum(), used)
    assert losses.dtype == torch.float32
    assert gradient.data_ptr() == used.data_ptr()
    assert gradient.dtype == torch.bfloat16


def test_logits_far_apart_stay_finite_and_nan_stays_nan():
    logits = torch.tensor([[0.0, -2e4, 3e4], [1e30, 0.0, 0.0], [0.0, float("-inf"), 0.0]])
    losses = used_up(logits, torch.tensor([1, 0, 0]))
    expected = torch.tensor([5e4, 0.0, math.log(2)])
    torch.testing.assert_close(losses, expected)
    assert used_up(torch.full((1, 4), float("nan")), torch.tensor([2])).isnan().all()
