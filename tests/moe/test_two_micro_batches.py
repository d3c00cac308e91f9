"""Two micro-batches in the same layer, side by side: each computes what it does by itself."""

from dataclasses import replace
from unittest.mock import patch

import gloo
import layers
import pytest
import torch
import torch.distributed as dist

from configs.schema import ParallelConfig
from pangu.backends import turns
from pangu.ops.grouped_matmul import Loop

# (router, dispatcher, expert parallel, tensor and expert tensor parallel size)
CASES = [
    (layers.MOGE, "local", 1, 1),
    (layers.MOGE, "moge", 2, 1),
    (layers.TOP_K, "allgather", 2, 1),
    (layers.TOP_K, "alltoall", 2, 1),
    (layers.TOP_K, "alltoall", 1, 2),
    (replace(layers.TOP_K, router="expert_choice"), "alltoall", 2, 1),
    (replace(layers.TOP_K, capacity_factor=0.5), "deduplicated", 2, 1),
    (layers.TOP_K, "deduplicated", 1, 2),
    (layers.TOP_K, "hierarchical", 2, 1),
    (layers.MOGE, "hierarchical", 2, 1),
]

PAIR = ["begin", "begin"]  # rows, and weights
ORDERS = {
    name: [
        *[*PAIR, "shared", "wait", "begin", "wait", "backward"],
        *["begin", "wait", *PAIR, "shared", "weights", "weights", "wait"],
    ]
    for name in ("moge", "allgather", "alltoall")
}


def inputs():
    """Two micro-batches of different lengths, which rank and weights tell apart."""
    torch.manual_seed(torch.distributed.get_rank())
    return [
        torch.randn(length, 2, layers.HIDDEN, dtype=torch.float64).requires_grad_()
        for length in (6, 10)
    ]


def results(layer, micro_batches, outputs, order):
    """Outputs, gradients of the inputs, and of the weights (which are cleared)."""
    for number in order:
        outputs[number].backward(micro_batches[number].detach().sin())
    gradients = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    return [*outputs, *(micro_batch.grad for micro_batch in micro_batches), *gradients]


def one_after_the_other(layer):
    micro_batches = inputs()
    outputs = []
    for micro_batch in micro_batches:
        outputs.append(layer(micro_batch)[0])
        outputs[-1].backward(micro_batch.detach().sin())
    gradients = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    return [*outputs, *(micro_batch.grad for micro_batch in micro_batches), *gradients]


def forward_forward_backward_backward(layer):
    micro_batches = inputs()
    outputs = [layer(micro_batch)[0] for micro_batch in micro_batches]
    return results(layer, micro_batches, outputs, (0, 1))


def stage_by_stage(layer):
    """Each stage of both before the next stage of either."""
    micro_batches, stages = inputs(), layer.token_dispatcher
    shared = [layer.shared_experts_compute(hidden) for hidden in micro_batches]
    routed = [layer.route(hidden) for hidden in micro_batches]
    sent = [
        stages.dispatch_preprocess(hidden, chosen, weights)
        for hidden, (weights, chosen) in zip(micro_batches, routed, strict=True)
    ]
    records = [record for record, _, _ in sent]
    received = [stages.token_dispatch(*parts) for parts in sent]
    rows = [stages.dispatch_postprocess(r, *x) for r, x in zip(records, received, strict=True)]
    done = [layer.experts(*x)[0] for x in rows]
    for stage in (stages.combine_preprocess, stages.token_combine, stages.combine_postprocess):
        done = [stage(record, x) for record, x in zip(records, done, strict=True)]
    outputs = [x + own for x, own in zip(done, shared, strict=True)]
    return results(layer, micro_batches, outputs, (1, 0))


def order(layer):
    """What happens in a forward pass and in its backward pass, in order: messages that begin, their
    ends, the shared expert's passes, and weight gradients of the routed ones."""
    seen = []

    def told(name, function):
        def tell(*given, **named):
            if name != "begin" or named.get("async_op"):
                seen.append(name)
            return function(*given, **named)

        return tell

    collectives = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    hidden = inputs()[0]
    hooks = [
        layer.shared_experts.register_forward_hook(lambda *_: seen.append("shared")),
        layer.shared_experts.register_full_backward_hook(lambda *_: seen.append("shared")),
    ]
    with (
        patch.multiple(dist, **{name: told("begin", getattr(dist, name)) for name in collectives}),
        patch.object(turns, "hand_over", told("wait", turns.hand_over)),
        patch.object(Loop, "weights", told("weights", Loop.weights)),
    ):
        output = layer(hidden)[0]
        seen.append("backward")
        output.sum().backward()
    for hook in hooks:
        hook.remove()
    layer.zero_grad()
    return seen


def differences():
    found = {}
    for moe, dispatcher, expert, tensor in CASES:
        sizes = {
            "tensor_model_parallel_size": tensor,
            "expert_model_parallel_size": expert,
            "expert_tensor_parallel_size": tensor,
        }
        gloo.parallel(ranks_per_node=1 if dispatcher == "hierarchical" else None, **sizes)
        layer = layers.build(replace(moe, dispatcher=dispatcher), ParallelConfig(**sizes))
        alone = one_after_the_other(layer)
        for side_by_side in (forward_forward_backward_backward, stage_by_stage):
            both = side_by_side(layer)
            worst = max((a - b).abs().max().item() for a, b in zip(alone, both, strict=True))
            found[moe.router, dispatcher, tensor, side_by_side.__name__] = worst
        sizes["overlap_expert_parallel"] = True
        layer = layers.build(replace(moe, dispatcher=dispatcher), ParallelConfig(**sizes))
        found[moe.router, dispatcher, tensor, "postponed"] = max(
            (a - b).abs().max().item()
            for a, b in zip(alone, one_after_the_other(layer), strict=True)
        )
        if dispatcher in ORDERS and tensor == 1:
            found[moe.router, dispatcher, tensor, "order"] = order(layer)
    return found


@pytest.mark.distributed
def test_two_micro_batches_do_not_mix():
    for found in gloo.run(2, differences):
        orders = {name[1]: found.pop(name) for name in list(found) if name[-1] == "order"}
        assert orders == ORDERS
        assert len(found) == 3 * len(CASES)
        assert {name: worst for name, worst in found.items() if not worst <= 1e-12} == {}
