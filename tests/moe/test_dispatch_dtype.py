"""Tokens that travel in fewer bits: what is exact stays so, the rest is as near as it can be."""

from dataclasses import replace

import gloo
import layers
import pytest
import torch
import torch.distributed as dist
import traffic

from configs.schema import ParallelConfig
from pangu.moe.dispatch.rows import quantise

RANKS, PER_NODE, TOKENS = 4, 2, 12
CASES = {
    "alltoall": layers.TOP_K,
    "deduplicated": layers.TOP_K,
    "allgather": layers.TOP_K,
    "hierarchical": layers.TOP_K,
    "moge": layers.MOGE,
}


def test_no_value_is_farther_than_half_a_scale():
    rows = torch.randn(50, 33) * torch.logspace(-20, 20, 50)[:, None]
    rows[7] = 0
    values, scales = quantise(rows)
    assert values.dtype is torch.int8
    back = values.float() * scales
    largest = rows.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(scales, largest / 127)
    assert bool(((back - rows).abs() <= 0.5001 * scales).all())


def exact():
    """Tokens that int8 with a scale per token, and bfloat16, hold exactly."""
    hidden = torch.randint(-126, 127, (TOKENS, 1, layers.HIDDEN)).float()
    hidden[..., 0] = 127
    return hidden / 64


def outcome(layer, hidden):
    """Output, gradients, and the bytes of rows that dispatch sent."""
    hidden = hidden.clone().requires_grad_()
    output, _ = layer(hidden)
    output.backward(hidden.detach().sin())
    gradients = [parameter.grad for parameter in layer.parameters()]
    return [output.detach(), hidden.grad, *gradients]


def measured():
    gloo.parallel(ranks_per_node=PER_NODE, expert_model_parallel_size=RANKS)
    parallel = ParallelConfig(expert_model_parallel_size=RANKS)
    torch.manual_seed(dist.get_rank())
    tokens = {"exact": exact(), "random": torch.randn(TOKENS, 1, layers.HIDDEN)}
    found = {}
    for dispatcher, moe in CASES.items():
        for name, hidden in tokens.items():
            results = {}
            for dtype in ("model", "bf16", "int8"):
                chosen = replace(moe, dispatcher=dispatcher, dispatch_dtype=dtype)
                layer = layers.build(chosen, parallel, precision="fp32")
                with traffic.watch() as sent:
                    results[dtype] = outcome(layer, hidden)
                narrow = torch.int8 if dtype == "int8" else torch.bfloat16
                assert (narrow in sent.dtypes) == (dtype != "model"), (dispatcher, dtype)
            for dtype in ("bf16", "int8"):
                found[dispatcher, name, dtype] = farthest(results[dtype], results["model"])
        summed = replace(moe, dispatcher=dispatcher, combine_dtype="bf16")
        layer = layers.build(summed, parallel, precision="fp32")
        found[dispatcher, "combine", "bf16"] = farthest(
            outcome(layer, tokens["random"]), results["model"]
        )
    return found


def farthest(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.distributed
def test_exact_tokens_and_gradients_stay_exact_and_others_are_near():
    for found in gloo.run(RANKS, measured):
        for (dispatcher, name, dtype), error in found.items():
            least, most = {"exact": (0, 1e-5), "random": (1e-5, 0.05), "combine": (1e-5, 0.05)}[
                name
            ]
            assert least <= error <= most, (dispatcher, name, dtype, error)
