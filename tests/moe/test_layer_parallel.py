"""Every dispatcher in every layout computes what one process computes: outputs and gradients."""

from dataclasses import replace

import gloo
import layers
import pytest
import torch
from megatron.core import parallel_state

from configs.schema import ParallelConfig

MOGE_SCALED = replace(layers.MOGE, router_scale=True)
ROUTERS = {
    "moge": MOGE_SCALED,
    "moge, whole groups per node": replace(MOGE_SCALED, num_expert_groups=2),
    "top_k": layers.TOP_K,
    "expert_choice": replace(layers.TOP_K, router="expert_choice", top_k=2),
    "capacity": replace(layers.TOP_K, capacity_factor=0.75),
    "collapse": replace(layers.TOP_K, top_k=1, renormalize=False),
}
RANKS_PER_NODE = 2
# Layout: (tensor, expert, expert tensor) parallel sizes and the dispatchers to try.
TWO_RANKS = {
    "EP2": (1, 2, 1),
    "ETP2": (2, 1, 2),
    "TP2+EP2": (2, 2, 1),
    "TP2+ETP1": (2, 1, 1),
    "DP2": (1, 1, 1),
}
FOUR_RANKS = {
    "TP2+EP4": (2, 4, 1),
    "EP2+DP2": (1, 2, 1),
    "TP4+EP2+ETP2": (4, 2, 2),
}


def dispatchers(router, expert, expert_tensor):
    names = ["allgather", "alltoall", "deduplicated"]
    if expert > 1 and expert_tensor == 1:
        names.append("hierarchical")
    if router.startswith("moge") and ROUTERS[router].num_expert_groups % expert == 0:
        names.append("moge")
    if expert * expert_tensor == 1:
        names.append("local")
    return names


def compare(layouts, precision):
    """Largest differences, relative to the largest value, of every layout, router, dispatcher."""
    found = {}
    for layout, (tensor, expert, expert_tensor) in layouts.items():
        whole = expert > 1 and expert_tensor == 1
        gloo.parallel(
            ranks_per_node=min(expert, RANKS_PER_NODE) if whole else None,
            tensor_model_parallel_size=tensor,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
        )
        parallel = ParallelConfig(
            tensor_model_parallel_size=tensor,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
        )
        for router, moe in ROUTERS.items():
            for dispatcher in dispatchers(router, expert, expert_tensor):
                key = (layout, router, dispatcher)
                found[key] = difference(
                    replace(moe, dispatcher=dispatcher), parallel, precision, router == "collapse"
                )
    return found


def difference(moe, parallel, precision, collapse):
    tensor = parallel.tensor_model_parallel_size
    data = parallel_state.get_data_parallel_world_size()
    layer = layers.build(moe, parallel, precision=precision)
    dtype = layer.router.weight.dtype
    weights = layers.full_weights(dtype=dtype)
    torch.manual_seed(3)
    positions, sequences = 8, 2
    hidden = torch.randn(positions, sequences * data, layers.HIDDEN, dtype=dtype)
    upstream = torch.randn_like(hidden)
    if collapse:  # every token to expert 5, which one rank holds
        hidden = hidden.abs() + 1
        weights["router.weight"].zero_()[5] = 1
        layer.router.weight.data.copy_(weights["router.weight"])

    def part(x):
        x = x.chunk(data, 1)[parallel_state.get_data_parallel_rank()]
        return x.chunk(tensor, 0)[parallel_state.get_tensor_model_parallel_rank()].contiguous()

    own = part(hidden).requires_grad_()
    output, bias = layer(own)
    assert bias is None
    output.backward(part(upstream))

    whole = hidden.clone().requires_grad_()
    leaves = {name: value.requires_grad_() for name, value in weights.items()}
    # Where experts choose, or are full, it is among the tokens of one rank.
    expected = torch.cat(
        [
            torch.cat(
                [
                    layers.reference(tokens.flatten(0, 1), leaves, moe).view_as(tokens)
                    for tokens in replica.chunk(tensor, 0)
                ]
            )
            for replica in whole.chunk(data, 1)
        ],
        dim=1,
    )
    expected.backward(upstream)

    pairs = {"output": (output, part(expected)), "input": (own.grad, part(whole.grad))}
    for name, parameter in layer.named_parameters():
        gradient = layers.summed(name, parameter.grad, tensor > 1)
        pairs[name] = (gradient, layers.own_part(name, leaves[name].grad))
    return {
        name: ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()
        for name, (a, b) in pairs.items()
    }


def check(results, tolerance):
    worst = {
        (key, name): value
        for found in results
        for key, differences in found.items()
        for name, value in differences.items()
        if not value <= tolerance
    }
    assert not worst
    assert all(len(found) == len(results[0]) for found in results)


def compare_both(layouts):
    return compare(layouts, "fp64"), compare({"EP2": layouts["EP2"]}, "fp32")


@pytest.mark.distributed
def test_two_ranks():
    results = gloo.run(2, compare_both, TWO_RANKS)
    doubles, singles = zip(*results, strict=True)
    assert {key[2] for key in doubles[0]} == {
        "local",
        "allgather",
        "alltoall",
        "deduplicated",
        "hierarchical",
        "moge",
    }
    check(doubles, 1e-12)
    check(singles, 1e-5)


@pytest.mark.distributed
def test_four_ranks():
    check(gloo.run(4, compare, FOUR_RANKS, "fp64"), 1e-12)
