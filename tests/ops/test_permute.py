import torch

from pangu.ops.permute import permute, permute_reference, plan, unpermute, unpermute_reference


def test_plan_sorts_by_expert_then_token():
    experts = torch.tensor([[2, 0], [0, 3], [2, 3]])
    permutation = plan(experts, num_experts=5)
    assert permutation.order_N.tolist() == [1, 2, 0, 4, 3, 5]
    assert permutation.slots_N.tolist() == [2, 0, 1, 4, 3, 5]
    assert permutation.counts_E.tolist() == [2, 0, 2, 2, 0]


def test_permute_and_unpermute_follow_their_references():
    experts = torch.rand(50, 9).topk(3).indices
    permutation = plan(experts, num_experts=9)
    tokens = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(150, 6, dtype=torch.float64, requires_grad=True)
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
