"""Router functions against references of a few lines, ties included."""

import math

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    topk_routing_with_score_function,
)

from configs.schema import MoEConfig
from pangu.moe.routing import Routing, routing_for, softmax, within_capacity
from pangu.ops.choice import highest


def moge_reference(logits, groups, k):
    """The paper's rule, one token and one group at a time; Python's sort is stable."""
    weights = torch.zeros_like(logits)
    for t, row in enumerate(logits.softmax(-1).tolist()):
        size = len(row) // groups
        for g in range(groups):
            members = range(g * size, (g + 1) * size)
            for e in sorted(members, key=lambda e: -row[e])[: k // groups]:
                weights[t, e] = row[e]
    return weights


def top_k_reference(scores, k):
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for t, row in enumerate(scores.tolist()):
        for e in sorted(range(len(row)), key=lambda e: -row[e])[:k]:
            mask[t, e] = True
    return mask


@pytest.mark.parametrize(("groups", "k"), [(4, 4), (4, 8), (2, 6), (1, 3), (8, 8)])
def test_moge(groups, k):
    logits = torch.randn(40, 16, dtype=torch.float64)
    routing = routing_for(MoEConfig(router="moge", num_expert_groups=groups, top_k=k))
    weights, chosen = routing(logits)
    torch.testing.assert_close(weights, moge_reference(logits, groups, k), rtol=0, atol=1e-15)
    assert (chosen.unflatten(1, (groups, -1)).sum(-1) == k // groups).all()


def test_moge_ties_go_to_the_lowest_index():
    routing = routing_for(MoEConfig(router="moge", num_expert_groups=2, top_k=4))
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0]])
    _, chosen = routing(logits)
    assert chosen.int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0]]
    few_values = torch.randint(0, 3, (200, 8)).double()
    weights, _ = routing(few_values)
    torch.testing.assert_close(weights, moge_reference(few_values, 2, 4), rtol=0, atol=1e-15)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_highest_with_ties(k):
    scores = torch.randint(0, 4, (300, 8)).float()
    assert torch.equal(highest(scores, k), top_k_reference(scores, k))


def test_highest_keeps_its_count_when_scores_are_not_finite():
    scores = torch.tensor([[float("nan")] * 4, [float("-inf")] * 4, [1.0, float("nan"), 3.0, 2.0]])
    assert highest(scores, 2).sum(-1).tolist() == [2, 2, 2]
    assert highest(scores, 2)[2].tolist() == [False, False, True, True]
    assert highest(scores, 1).sum(-1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("after", [False, True])
def test_top_k_is_megatrons(after):
    logits = torch.randn(50, 16)
    weights, chosen = routing_for(MoEConfig(top_k=4, softmax_after_top_k=after))(logits)
    expected, expected_map = topk_routing_with_score_function(
        logits, 4, use_pre_softmax=not after, score_function="softmax"
    )
    assert torch.equal(chosen, expected_map)
    torch.testing.assert_close(weights, expected)


def test_group_limited_with_bias_is_megatrons():
    logits, bias = torch.randn(60, 32), torch.randn(32)
    moe = MoEConfig(
        router="group_limited",
        num_expert_groups=8,
        topk_group=4,
        top_k=8,
        score_function="sigmoid",
        renormalize=True,
        scaling_factor=2.5,
    )
    weights, chosen = routing_for(moe)(logits, bias)
    expected, expected_map = topk_routing_with_score_function(
        logits,
        8,
        num_groups=8,
        group_topk=4,
        scaling_factor=2.5,
        score_function="sigmoid",
        expert_bias=bias,
    )
    assert torch.equal(chosen, expected_map)
    torch.testing.assert_close(weights, expected)


def test_the_bias_moves_the_choice_and_not_the_weights():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    weights, chosen = routing_for(MoEConfig(top_k=1))(logits, torch.tensor([0.0, 0.0, 0.0, 9.0]))
    assert chosen.tolist() == [[False, False, False, True]]
    assert weights[0, 3] == logits.softmax(-1)[0, 3]


def test_renormalised_and_scaled_weights():
    moe = MoEConfig(
        router="moge", num_expert_groups=2, top_k=4, renormalize=True, scaling_factor=2.5
    )
    weights, chosen = routing_for(moe)(torch.randn(9, 8))
    torch.testing.assert_close(weights.sum(-1), torch.full((9,), 2.5))
    assert (weights[~chosen] == 0).all()


def test_expert_choice_gives_every_expert_its_capacity():
    logits = torch.randn(32, 8)
    weights, chosen = routing_for(MoEConfig(router="expert_choice", top_k=2))(logits)
    scores = logits.softmax(-1)
    assert chosen.sum(0).tolist() == [8] * 8
    assert torch.equal(chosen, top_k_reference(scores.t(), 8).t())
    torch.testing.assert_close(weights, scores * chosen)


@pytest.mark.parametrize("router", ["top_k", "moge"])
def test_what_an_expert_has_no_room_for_is_what_megatron_core_drops(router):
    moe = MoEConfig(router=router, num_expert_groups=2, top_k=4)
    # Few popular experts; of equal weights ours keeps the first, megatron-core any.
    logits = torch.randn(61, 8, dtype=torch.float64) + torch.arange(8.0)
    weights, chosen = routing_for(moe)(logits)
    for factor in (0.3, 1.0, 1.25, 1.9, 3.0):
        served = within_capacity(weights, chosen, factor, moe.top_k)
        _, expected = apply_router_token_dropping(weights, chosen, moe.top_k, factor)
        assert torch.equal(served, expected)
        assert served.sum(dim=0).max() <= math.ceil(factor * 61 * 4 / 8)
    assert not torch.equal(within_capacity(weights, chosen, 1.0, moe.top_k), chosen)
    alike = torch.ones(8, 2), torch.ones(8, 2, dtype=torch.bool)
    assert within_capacity(*alike, 0.75, 1).tolist() == [[True] * 2] * 3 + [[False] * 2] * 5


def test_forced_balance_is_exact():
    _, chosen = routing_for(MoEConfig(router="forced_balance", top_k=3))(torch.randn(16, 8))
    assert chosen.sum(0).tolist() == [6] * 8
    assert (chosen.sum(1) == 3).all()


def test_gradients_reach_the_logits_through_the_weights_alone():
    logits = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    weights, chosen = routing_for(MoEConfig(router="moge", num_expert_groups=2, top_k=2))(logits)
    upstream = torch.randn(20, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(weights, logits, upstream)
    (expected,) = torch.autograd.grad(logits.softmax(-1) * chosen, logits, upstream)
    torch.testing.assert_close(grad, expected)


def test_any_of_the_three_functions_can_be_replaced():
    routing = routing_for(MoEConfig(top_k=2))
    own = Routing(softmax, routing.choice, lambda scores, chosen: chosen.to(scores.dtype))
    weights, chosen = own(torch.randn(5, 6))
    assert torch.equal(weights, chosen.float())
