from dataclasses import replace

import in_interpreter  # first
import pytest
import torch

from configs.schema import MoEConfig
from pangu import backends
from pangu.moe import routing as routing_module
from pangu.moe.routing import Routing, routing_for
from pangu.ops import routing
from pangu.ops.routing import Rule, route_triton

RULES = {
    "MoGE": MoEConfig(router="moge", num_expert_groups=4, top_k=8),
    "MoGE, renormalized": MoEConfig(
        router="moge", num_expert_groups=3, top_k=3, renormalize=True, scaling_factor=2.5
    ),
    "top-k": MoEConfig(router="top_k", num_expert_groups=4, top_k=5, renormalize=True),
    "sigmoid": MoEConfig(
        router="top_k", num_expert_groups=1, top_k=3, score_function="sigmoid", renormalize=True
    ),
}


@pytest.mark.parametrize("biased", [False, True], ids=("", "biased"))
@pytest.mark.parametrize("name", RULES)
def test_weights_choices_and_gradient_are_those_of_the_three_functions(name, biased):
    """In float64, one after the other, as the router has them without kernels."""
    plain = routing_for(RULES[name])
    logits = torch.randn(87, 24)
    bias = torch.linspace(-0.02, 0.02, 24) if biased else None
    wide = None if bias is None else bias.double()
    assert torch.equal(route_triton(logits, bias, plain.rule)[1], plain(logits.double(), wide)[1])
    in_interpreter.follows(
        lambda x: route_triton(x, bias, plain.rule)[0],
        lambda x: plain(x, wide)[0],
        (logits,),
        dtype=torch.float32,
    )


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(3, 8),
        torch.tensor([[0.0, 0.0, float("nan"), 0.0, 5.0, 0.0, 0.0, 5.0]]),
        torch.tensor([[1e4, 1e4, 0.0, -1e4, 0.0, 0.0, 0.0, 0.0]]),
        torch.empty(0, 8),
    ],
    ids=("equals", "no number", "far apart", "no tokens"),
)
def test_equals_go_to_the_lowest_and_as_many_are_chosen(logits):
    rule = Rule(2, 4, softmax=True, renormalize=False, factor=1.0)
    expected = routing.route_reference(logits, None, rule)
    torch.testing.assert_close(route_triton(logits, None, rule), expected, equal_nan=True)


def test_what_has_no_rule_stays_three_functions():
    assert type(routing_for(MoEConfig(router="group_limited"))) is Routing
    assert type(routing_for(MoEConfig(router="top_k", softmax_after_top_k=True))) is Routing
    assert type(routing_for(MoEConfig(router="moge", score_function="gated"))) is Routing


def test_the_backend_says_whether_it_is_one_pass(monkeypatch):
    route, seen = routing_for(RULES["MoGE"]), []
    monkeypatch.setattr(routing_module, "route_triton", lambda *given: seen.append(given))
    logits, here = torch.randn(5, 24), backends.current()
    route(logits)
    assert seen == []
    one_pass = replace(here, operators=replace(here.operators, routing="triton"))
    monkeypatch.setattr(backends, "_current", one_pass)
    route(logits)
    assert seen == [(logits, None, route.rule)]
