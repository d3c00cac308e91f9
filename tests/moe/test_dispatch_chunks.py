"""Tokens that travel in chunks: the layer computes and sends what it does in one, and its messages
go beside its own experts, forward and backward."""

from dataclasses import replace
from unittest.mock import patch

import gloo
import layers
import pytest
import torch
import torch.distributed as dist
import traffic

from configs.schema import MemoryConfig, ParallelConfig
from pangu.backends import turns
from pangu.moe.experts import GroupedExperts
from pangu.ops.grouped_matmul import Loop

POSITIONS, SEQUENCES = 7, 2
EXPERT_CHOICE = replace(layers.TOP_K, router="expert_choice")
CAPACITY = replace(layers.TOP_K, capacity_factor=0.5)
WITH_LOSSES = replace(layers.TOP_K, aux_loss_coefficient=0.1, z_loss_coefficient=0.01)
FC1 = MemoryConfig(recompute_granularity="selective", recompute_modules=["moe_fc1"])
WHOLE = MemoryConfig(recompute_granularity="selective", recompute_modules=["moe"])
# (router, dispatcher, expert parallel, tensor and expert tensor parallel size, memory)
CASES = [
    (layers.MOGE, "local", 1, 1, None),
    (WITH_LOSSES, "local", 1, 1, FC1),
    (layers.MOGE, "moge", 2, 1, None),
    (layers.MOGE, "moge", 2, 1, FC1),
    (layers.TOP_K, "allgather", 2, 1, WHOLE),
    (WITH_LOSSES, "alltoall", 2, 1, None),
    (layers.MOGE, "alltoall", 1, 2, None),
    (EXPERT_CHOICE, "alltoall", 2, 1, FC1),
    (layers.MOGE, "deduplicated", 2, 1, WHOLE),
    (CAPACITY, "deduplicated", 2, 1, None),
    (layers.TOP_K, "deduplicated", 1, 2, None),
    (layers.TOP_K, "hierarchical", 2, 1, None),
    (layers.MOGE, "hierarchical", 2, 1, None),
]


def results(layer):
    """What a step gives (output, gradients of inputs and weights, counts of the router), and the
    elements that it sends to every rank, forward and backward."""
    torch.manual_seed(dist.get_rank())
    hidden = torch.randn(POSITIONS, SEQUENCES, layers.HIDDEN, dtype=torch.float64).requires_grad_()
    with traffic.watch() as sent:
        output = layer(hidden)[0]
        output.backward(hidden.detach().sin())
    load = layer.router.load
    found = [output, hidden.grad, *(each.grad for each in layer.parameters())]
    return [*found, load.counts.double(), load.losses.double()], sent


def compare():
    """Of each case the largest difference between chunks and none, and both's traffic."""
    found = {}
    for moe, dispatcher, expert, tensor, memory in CASES:
        if max(expert, tensor) > dist.get_world_size():
            continue
        sizes = {
            "tensor_model_parallel_size": tensor,
            "expert_model_parallel_size": expert,
            "expert_tensor_parallel_size": tensor,
        }
        gloo.parallel(ranks_per_node=1 if dispatcher == "hierarchical" else None, **sizes)
        moe, parallel = replace(moe, dispatcher=dispatcher), ParallelConfig(**sizes)
        whole, sent = results(layers.build(moe, parallel, memory=memory))
        for chunks in (2, 3):
            layer = layers.build(replace(moe, dispatch_chunks=chunks), parallel, memory=memory)
            parts, sent_in_parts = results(layer)
            pairs = zip(whole, parts, strict=True)
            worst = max((a - b).abs().max().item() for a, b in pairs)
            again = memory.recompute_modules[0] if memory else ""
            same = torch.equal(sent.sent(), sent_in_parts.sent())
            calls = len(sent_in_parts.calls) / max(len(sent.calls), 1)
            found[moe.router, dispatcher, tensor, again, chunks] = worst, same, calls
    return found


def check(found):
    assert found
    for name, (worst, same, calls) in found.items():
        assert worst <= 1e-12, (name, worst)
        assert same, name
        assert calls in (0, name[-1]), (name, calls)


def test_one_process_computes_the_same_in_chunks():
    check(gloo.alone(compare))


def order():
    """What happens in a forward and backward pass of four chunks, in order: rows that begin to
    travel and the ends of that, the shared expert, and the experts."""
    gloo.parallel(expert_model_parallel_size=2)
    moe = replace(layers.MOGE, dispatcher="moge", dispatch_chunks=3)
    layer = layers.build(moe, ParallelConfig(expert_model_parallel_size=2))
    seen = []

    def told(name, function):
        def tell(*given, **named):
            seen.append(name)
            return function(*given, **named)

        return tell

    collectives = {"all_gather_into_tensor": "gather", "reduce_scatter_tensor": "sum"}
    sent = {name: told(word, getattr(dist, name)) for name, word in collectives.items()}
    hooks = [
        layer.shared_experts.register_forward_hook(lambda *_: seen.append("shared")),
        layer.shared_experts.register_full_backward_hook(lambda *_: seen.append("shared")),
    ]
    with (
        patch.multiple(dist, **sent),
        patch.object(turns, "hand_over", told("wait", turns.hand_over)),
        patch.object(Loop, "weights", told("weights", Loop.weights)),
        patch.object(GroupedExperts, "forward", told("experts", GroupedExperts.forward)),
        patch.object(Loop, "rows", told("rows", Loop.rows)),
    ):
        output = layer(torch.randn(6, 2, layers.HIDDEN, dtype=torch.float64, requires_grad=True))[0]
        seen.append("backward")
        output.sum().backward()
    for hook in hooks:
        hook.remove()
    return " ".join(seen)


COMPUTE = "experts rows rows"
GRADIENT = "rows rows"
WEIGHTS = "weights weights"
ORDER = [
    *["gather shared wait"],
    *["gather", COMPUTE, "wait"],
    *["gather sum", COMPUTE, "wait wait"],
    *["sum", COMPUTE, "wait"],
    *["sum wait"],
    "backward",
    *["gather wait"],
    *["gather", GRADIENT, "wait"],
    *["sum gather", WEIGHTS, GRADIENT, "wait wait"],
    *["sum", WEIGHTS, GRADIENT, "wait"],
    *["sum shared", WEIGHTS, "wait"],
]


def both():
    return compare(), order()


@pytest.mark.distributed
def test_two_ranks_compute_and_send_the_same_in_chunks_beside_their_experts():
    for found, seen in gloo.run(2, both):
        assert len(found) == 2 * len(CASES)
        check(found)
        assert seen == " ".join(ORDER)
