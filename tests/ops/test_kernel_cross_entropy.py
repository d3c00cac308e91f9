import math

import gloo
import in_interpreter  # before any kernel
import pytest
import torch
import torch.distributed as dist

from pangu.ops.cross_entropy import cross_entropy_reference, cross_entropy_triton


def used_up(logits, labels, group=None):
    """The kernel on a copy."""
    return cross_entropy_triton(logits.clone(), labels, group)


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


def part_of_the_vocabulary(logits, labels, upstream):
    """Losses and this rank's part of the gradient."""
    import in_interpreter  # noqa: F401 - in this process

    group = dist.group.WORLD
    part = logits.chunk(group.size(), dim=1)[group.rank()].clone().requires_grad_()
    losses = used_up(part, labels, group)
    (gradient,) = torch.autograd.grad(losses, part, upstream)
    return losses.detach(), gradient


@pytest.mark.distributed
def test_ranks_with_a_part_of_the_vocabulary_each_lose_what_one_does():
    logits, labels = 3 * torch.randn(7, 20), torch.randint(0, 20, (7,))
    upstream = torch.randn(7)
    whole = logits.clone().requires_grad_()
    expected = cross_entropy_reference(whole, labels)
    (gradient,) = torch.autograd.grad(expected, whole, upstream)
    found = gloo.run(2, part_of_the_vocabulary, logits, labels, upstream)
    for losses, _ in found:
        torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(torch.cat([part for _, part in found], dim=1), gradient)
