"""One rank's experts against one SwiGLU MLP per expert."""

from dataclasses import replace

import gloo
import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from pangu import backends
from pangu.moe.config import MoETransformerConfig
from pangu.moe.experts import GroupedExperts

HIDDEN, WIDTH, EXPERTS = 8, 6, 4


def build(**options):
    gloo.single()
    config = MoETransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=WIDTH,
        moe_grouped_gemm=True,
        gated_linear_unit=True,
        add_bias_linear=False,
        params_dtype=torch.float64,
        **options,
    )
    torch.manual_seed(0)
    return GroupedExperts(EXPERTS, config, get_default_pg_collection())


def reference(experts, rows, counts, weights):
    """Ten lines: each expert in turn."""
    outputs = []
    start = 0
    for expert, count in enumerate(counts):
        x = rows[start : start + count]
        gate = x @ experts.w1[expert, :, 0]
        up = x @ experts.w1[expert, :, 1]
        scale = weights[start : start + count, None]
        outputs.append((F.silu(gate) * up * scale) @ experts.w2[expert])
        start += count
    return torch.cat(outputs)


COUNTS = [[3, 3, 3, 3], [0, 11, 0, 1], [0, 0, 12, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("recompute", ["", "moe_act", "moe_fc1"])
@pytest.mark.parametrize("later", [False, True])
def test_values_and_gradients(counts, recompute, later):
    experts = build(recomputed=frozenset({recompute}))
    rows = torch.randn(sum(counts), HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(sum(counts), dtype=torch.float64, requires_grad=True)
    inputs = (rows, weights, experts.w1, experts.w2)
    upstream = torch.randn(sum(counts), HIDDEN, dtype=torch.float64)

    postponed = experts.postponed() if later else None
    output, bias = experts(rows, torch.tensor(counts), weights, postponed)
    output.backward(upstream)
    grads = [x.grad for x in inputs]

    expected = reference(experts, rows, counts, weights)
    assert bias is None
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    expected_grads = list(torch.autograd.grad(expected, inputs, upstream))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_recompute_keeps_less():
    kept = {}
    for recompute in ("", "moe_act", "moe_fc1"):
        experts = build(recomputed=frozenset({recompute}))
        rows = torch.randn(100, HIDDEN, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(100, dtype=torch.float64)
        saved = []

        def record(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            output, _ = experts(rows, torch.tensor([25] * EXPERTS), weights)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        for parameter in experts.parameters():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
        kept[recompute] = sum(storages.values())
        output.sum().backward()
    assert kept[""] - kept["moe_act"] == 100 * WIDTH * 8
    assert kept[""] - kept["moe_fc1"] == 100 * 3 * WIDTH * 8


@pytest.mark.parametrize("variant", ["loop", "separate"])
def test_the_engines_gradient_buffer_gets_every_gradient_once(variant, monkeypatch):
    """megatron-core's data parallelism: hooks add `grad` to `main_grad` unless told otherwise."""
    here = backends.current()
    operators = replace(here.operators, weight_gradient=variant)
    monkeypatch.setattr(backends, "_current", replace(here, operators=operators))
    counts = torch.tensor([3, 0, 5, 1])
    batches = [torch.randn(9, HIDDEN, dtype=torch.float64) for _ in range(2)]
    weights = torch.rand(9, dtype=torch.float64)
    experts, plain = build(), build()
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=False)
    wrapped = DistributedDataParallel(experts.config, config, experts)
    wrapped.zero_grad_buffer()
    for batch, postponed in zip(batches, (None, experts.postponed()), strict=True):
        for module, later in ((wrapped, postponed), (plain, None)):
            module(batch, counts, weights, later)[0].square().sum().backward()
    for parameter, expected in zip(experts.parameters(), plain.parameters(), strict=True):
        assert parameter.grad_added_to_main_grad == (variant == "loop")
        assert parameter.grad is None
        torch.testing.assert_close(parameter.main_grad, expected.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("recompute", ["", "moe_fc1"])
def test_several_calls_in_one_pass_give_the_engine_one_gradient(recompute):
    """With and without main gradients, which hooks fill."""
    counts, calls = [torch.tensor(each) for each in ([3, 0, 5, 1], [0, 2, 0, 4], [1, 1, 1, 0])], []
    parts = [torch.randn(int(each.sum()), HIDDEN, dtype=torch.float64) for each in counts]
    experts, buffered, plain = (build(recomputed=frozenset({recompute})) for _ in range(3))
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=False)
    wrapped = DistributedDataParallel(buffered.config, config, buffered)
    wrapped.zero_grad_buffer()
    for parameter in experts.parameters():
        parameter.register_post_accumulate_grad_hook(calls.append)
    for module in (experts, wrapped, plain):
        total, before = 0.0, None
        for rows, each in zip(parts, counts, strict=True):
            if module is not plain:
                before = (buffered if module is wrapped else module).postponed(before)
            rows = rows.clone().requires_grad_()
            output, _ = module(rows, each, torch.ones(len(rows), dtype=torch.float64), before)
            total = total + output.square().sum()
        total.backward()
    assert len(calls) == 2
    gradients = zip(*(m.parameters() for m in (experts, buffered, plain)), strict=True)
    for one, main, expected in gradients:
        torch.testing.assert_close(one.grad, expected.grad, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(main.main_grad, expected.grad, rtol=1e-13, atol=1e-13)


def test_parameters_say_how_they_are_split():
    experts = build()
    for parameter, dim in ((experts.w1, 3), (experts.w2, 1)):
        assert parameter.partition_dim == dim
        assert parameter.shape[dim] == WIDTH
        assert parameter.allreduce is False
        assert parameter.global_expert_indices == list(range(EXPERTS))
