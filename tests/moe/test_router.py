"""The router module on one process."""

from dataclasses import replace

import gloo
import layers
import pytest
import torch
from megatron.core import tensor_parallel

from configs.schema import MoEConfig
from pangu.moe.balancing_bias import balance
from pangu.moe.routing import routing_for

LOSSES = MoEConfig(
    router="moge", num_expert_groups=4, top_k=4, aux_loss_coefficient=0.5, z_loss_coefficient=0.1
)
PLAIN = replace(LOSSES, aux_loss_coefficient=0.0, z_loss_coefficient=0.0)


@pytest.fixture(autouse=True)
def _process_group():
    gloo.single()


def kept_bytes(moe, tokens):
    """What the router keeps for its backward, each storage once."""
    router = layers.build(moe).router
    hidden = torch.randn(tokens, 2, layers.HIDDEN, dtype=torch.float64, requires_grad=True)
    storages = {}

    def record(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        weights, _ = router(hidden)
    assert weights.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_the_losses_keep_a_number_per_expert_not_per_token(scope, score_function):
    moe = replace(LOSSES, aux_loss_scope=scope, score_function=score_function)
    plain = replace(PLAIN, score_function=score_function)
    per_expert = layers.EXPERTS * 8 * (2 if scope == "sequence" else 1)
    for tokens in (16, 512):
        assert kept_bytes(moe, tokens) - kept_bytes(plain, tokens) == per_expert


def test_recomputation_counts_once_and_gives_the_same_gradient():
    hidden = torch.randn(16, 2, layers.HIDDEN, dtype=torch.float64)
    found = []
    for recompute in (False, True):
        layer = layers.build(replace(LOSSES, expert_bias=True, aux_loss_scope="global_batch"))
        x = hidden.clone().requires_grad_()
        output = (
            tensor_parallel.checkpoint(lambda y, layer=layer: layer(y)[0], False, x)
            if recompute
            else layer(x)[0]
        )
        output.square().sum().backward()
        load = layer.router.load
        assert load.counts.sum() == 16 * 2 * 4
        assert torch.equal(layer.router.local_tokens_per_expert.long(), load.counts)
        found.append((x.grad, layer.router.weight.grad, load.counts.clone(), load.losses.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=1e-13)


def test_evaluation_counts_nothing():
    layer = layers.build(LOSSES).eval()
    layer(torch.randn(16, 2, layers.HIDDEN, dtype=torch.float64))
    assert layer.router.load.counts.sum() == 0


def test_the_expert_bias_rises_for_experts_with_few_tokens():
    layer = layers.build(replace(PLAIN, expert_bias=True, expert_bias_update_rate=0.25))
    output, _ = layer(torch.randn(64, 2, layers.HIDDEN, dtype=torch.float64))
    output.sum().backward()
    counts = layer.router.load.counts
    wrapped = torch.nn.ModuleList([layer])
    balance([wrapped], 0.25, skipped=False)
    expected = torch.sign(counts.float().mean() - counts) * 0.25
    assert torch.equal(layer.router.expert_bias, expected)
    assert (expected != 0).any()
    assert layer.router.local_tokens_per_expert.sum() == 0  # counting starts anew
    layer.router.local_tokens_per_expert += counts
    balance([wrapped], 0.25, skipped=True)
    assert torch.equal(layer.router.expert_bias, expected)


def test_router_arithmetic_is_float32_in_a_bfloat16_model():
    layer = layers.build(replace(PLAIN, router_scale=True, expert_bias=True), precision="bf16")
    layer = layer.bfloat16()
    hidden = torch.randn(32, 1, layers.HIDDEN).bfloat16()
    weights, chosen = layer.router(hidden)
    logits = hidden.flatten(0, 1).float() @ layer.router.weight.float().t()
    expected, expected_chosen = routing_for(PLAIN)(logits)
    assert weights.dtype == torch.float32
    assert layer.router.expert_bias.dtype == torch.float32
    assert torch.equal(chosen, expected_chosen)
    torch.testing.assert_close(weights, expected * layer.router.router_scale.float())


def test_a_padding_mask_is_refused():
    with pytest.raises(ValueError, match="every token is routed"):
        layers.build(PLAIN).router(torch.randn(4, 1, layers.HIDDEN), torch.ones(4, 1))


@pytest.mark.parametrize("kind", ["expert_choice", "forced_balance", "group_limited", "moge"])
def test_the_whole_layer_follows_its_reference(kind):
    moe = replace(PLAIN, router=kind, topk_group=2, renormalize=True)
    layer = layers.build(moe)
    hidden = torch.randn(16, 2, layers.HIDDEN, dtype=torch.float64)
    expected = layers.reference(hidden.flatten(0, 1), layers.full_weights(), moe)
    torch.testing.assert_close(layer(hidden)[0].flatten(0, 1), expected, rtol=1e-12, atol=1e-12)


def test_not_a_number_in_the_input_stays_a_number_of_rows():
    layer = layers.build(LOSSES)
    output, _ = layer(torch.full((4, 1, layers.HIDDEN), float("nan"), dtype=torch.float64))
    assert output.isnan().all()
    assert layer.router.load.counts.tolist() == [4, 0] * 4


def test_a_full_expert_turns_tokens_away_in_training_alone():
    moe = replace(PLAIN, router="top_k", top_k=1, capacity_factor=1.25)
    layer = layers.build(moe)
    with torch.no_grad():
        layer.router.weight.zero_()[5] = 1
    hidden = torch.randn(16, 2, layers.HIDDEN, dtype=torch.float64).abs() + 1
    rows = []
    layer.experts.register_forward_pre_hook(lambda _, given: rows.append(given[0].size(0)))
    layer(hidden)
    assert layer.router.load.counts.tolist() == [0, 0, 0, 0, 0, 5, 0, 0]  # 1.25 * 32 / 8
    layer.eval()(hidden)
    assert rows == [5, 32]
