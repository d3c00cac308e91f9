"""Copies of weights: made once they pay, kept within their room, never those of old weights."""

import pytest
import torch

from pangu import backends
from pangu.ops.grouped_matmul import Loop, grouped_matmul
from pangu.ops.linear import linear
from pangu.ops.packed_weights import PackedWeights, using

USES = 24  # before a copy


@pytest.fixture(autouse=True)
def _onednn():
    here = backends.current().operators
    backends.use(backends.replace(here, linear="onednn"))
    yield
    backends.use(here)


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def copied(packed, weight):
    for _ in range(USES):
        copy = packed.of(weight)
    return copy


def test_a_copy_is_made_once_it_pays():
    packed, weight = PackedWeights(10**6), weights(80, 48)
    assert [packed.of(weight) is None for _ in range(USES)] == [True] * (USES - 1) + [False]
    assert packed.of(weight) is packed.of(weight)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_with_copies_are_those_with_weights(rows):
    packed, weight, bias = PackedWeights(10**6), weights(80, 48), weights(80, seed=1)
    copied(packed, weight)
    for number in range(3):
        x = weights(rows, 48, seed=number)
        with using(packed):
            found = linear(x, weight, bias)
        expected = x.double() @ weight.double().t() + bias.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
        weight.add_(1)  # in place: its copy is no longer its own


def test_copies_stay_within_their_room_and_leave_it():
    first, second = weights(80, 48), weights(80, 48, seed=1)
    packed = PackedWeights(4 * first.numel() + 5)
    assert copied(packed, first) is not None
    assert copied(packed, second) is None
    packed.forget()
    assert packed.of(first) is None
    assert copied(packed, second) is not None
    assert copied(PackedWeights(10**6), first.double()) is None


def test_experts_take_copies_where_no_gradient_is_wanted():
    packed = PackedWeights(10**6)
    x, stack = weights(9, 16), weights(4, 16, 24, seed=1)
    counts = torch.tensor([4, 0, 3, 2])
    expected = Loop.rows(x.double(), stack.double(), counts)
    with using(packed), torch.no_grad():
        for _ in range(USES + 1):
            found = grouped_matmul(x, stack, counts)
        none = grouped_matmul(x[:0], stack, 0 * counts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
    assert [packed.of(w.t()) is not None for w in stack] == [True, False, True, True]
    assert none.shape == (0, 24)
    with using(packed):
        assert grouped_matmul(x.requires_grad_(), stack, counts).requires_grad


def test_outside_of_a_pass_there_are_none():
    packed, weight, x = PackedWeights(10**6), weights(80, 48), weights(1, 48)
    copied(packed, weight)
    with torch.no_grad():
        weight.data.zero_()  # behind its back
    with using(packed):
        assert linear(x, weight).count_nonzero() > 0  # the copy is what it was
    assert linear(x, weight).count_nonzero() == 0
    packed.forget()
    with using(packed):
        assert linear(x, weight).count_nonzero() == 0
