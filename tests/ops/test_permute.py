import pytest
import torch

from pangu.ops.permute import (
    permute,
    permute_reference,
    plan,
    plan_map,
    plan_rows,
    unpermute,
    unpermute_reference,
)


def test_plan_sorts_by_expert_then_token():
    experts = torch.tensor([[2, 0], [0, 3], [2, 3]])
    permutation = plan(experts, num_experts=5)
    assert permutation.order_N.tolist() == [1, 2, 0, 4, 3, 5]
    assert permutation.slots_N.tolist() == [2, 0, 1, 4, 3, 5]
    assert permutation.counts_E.tolist() == [2, 0, 2, 2, 0]


def test_plan_of_a_map_sorts_by_expert_then_token():
    chosen = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]]).bool()
    permutation = plan_map(chosen)
    assert permutation.tokens_N.tolist() == [2, 0, 2, 3, 0]
    assert permutation.order_N.tolist() == [6, 1, 7, 10, 2]
    assert permutation.slots_N.tolist() == [1, 4, 0, 2, 3]
    assert permutation.starts_T.tolist() == [0, 2, 2, 4, 5]
    assert permutation.counts_E.tolist() == [1, 3, 1]


def test_a_map_of_equal_choices_is_planned_as_their_table():
    chosen = torch.zeros(20, 6, dtype=torch.bool)
    experts = torch.rand(20, 6).topk(2).indices.sort().values
    chosen.scatter_(1, experts, True)
    table, by_map = plan(experts, num_experts=6), plan_map(chosen)
    for name in ("tokens_N", "slots_N", "starts_T", "counts_E"):
        assert torch.equal(getattr(table, name), getattr(by_map, name))


@pytest.mark.parametrize("planned", ["table", "map"])
def test_permute_and_unpermute_follow_their_references(planned):
    if planned == "table":
        permutation = plan(torch.rand(50, 9).topk(3).indices, num_experts=9)
    else:
        permutation = plan_map(torch.rand(50, 9) < 0.3)
    tokens = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(permutation.tokens_N.numel(), 6, dtype=torch.float64, requires_grad=True)
    cases = ((permute, permute_reference, tokens), (unpermute, unpermute_reference, rows))
    for function, reference, x in cases:
        y, expected = function(x, permutation), reference(x, permutation)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
        upstream = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, upstream)
        (expected_grad,) = torch.autograd.grad(expected, x, upstream)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-14)


def test_rows_belong_to_the_tokens_that_chose_the_expert():
    experts = torch.tensor([[1], [0], [1]])
    permutation = plan(experts, num_experts=2)
    assert permute(torch.tensor([[10.0], [20.0], [30.0]]), permutation).tolist() == [
        [20.0],
        [10.0],
        [30.0],
    ]


def test_no_tokens():
    permutation = plan(torch.empty(0, 2, dtype=torch.int64), num_experts=3)
    assert permutation.counts_E.tolist() == [0, 0, 0]
    assert unpermute(permute(torch.empty(0, 4), permutation), permutation).shape == (0, 4)


def test_no_token_chose_any_expert():
    permutation = plan_map(torch.zeros(3, 2, dtype=torch.bool))
    assert permutation.counts_E.tolist() == [0, 0]
    tokens = torch.ones(3, 4, requires_grad=True)
    output = unpermute(permute(tokens, permutation), permutation)
    assert torch.equal(output, torch.zeros(3, 4))
    output.sum().backward()
    assert torch.equal(tokens.grad, torch.zeros(3, 4))


def test_a_list_of_choices_by_row_is_planned_as_its_map():
    chosen = torch.rand(30, 6) < 0.4
    chosen[:, 2] = True  # every row has a choice
    rows, experts = chosen.nonzero(as_tuple=True)
    listed, by_map = plan_rows(experts, rows, 30, 6), plan_map(chosen)
    for name in ("tokens_N", "slots_N", "starts_T", "counts_E", "num_choices"):
        a, b = getattr(listed, name), getattr(by_map, name)
        assert a is b is None or torch.equal(a, b)
