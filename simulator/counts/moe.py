"""A mixture-of-experts layer: router, dispatch, grouped matrices, combine, shared expert.

Counts assume that every expert-parallel rank receives its fair share of rows times
`load`: the expected maximum over ranks relative to the mean (1 for MoGE with whole groups).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from simulator.array import Array
from simulator.counts.dispatch import exchange, uses
from simulator.counts.mlp import two_matrices
from simulator.counts.records import (
    Counts,
    Operator,
    Saved,
    Shapes,
    added_bytes,
    grouped_matmul,
    vector,
)
from simulator.counts.torch_kernels import SCAN_BYTES_PER_ROW, gathered, norm, summed
from simulator.parameters import mlp_linears, router_rows

# The modules whose recomputation repeats the way to the experts, their first product, and the
# activation function.
ROUTE = ("moe", "moe_permute")
FC1 = ("moe", "moe_fc1")
ACTIVATION = ("moe", "moe_act", "moe_fc1")
SHORT_KERNELS = 16  # over scores, forward and backward each


def moe(s: Shapes, load: Array = 1.0) -> Counts:
    """Norm, router, experts and shared expert of one layer, with the residual addition."""
    hidden, element = s.model.hidden_size, s.element
    stream = s.shard * hidden * element
    counts = Counts(
        operators=[
            *norm(s, "moe.norm", s.shard, hidden, "layernorm"),
            *_router(s),
            *vector("moe.residual", 3 * stream, stream),
            *(norm(s, "moe.post_norm", s.shard, hidden) if s.model.sandwich_norm else []),
        ],
        saved=[
            Saved("moe.norm input", stream, swapped_by=("layernorm",)),
            Saved("moe.norm output", stream, ("layernorm",)),
            Saved("moe.norm statistics", 4.0 * s.shard),
            Saved(
                "moe.router scores",
                8.0 * s.shard * router_rows(s.model, s.moe),
                ROUTE,
            ),
            *(
                [Saved("moe.post_norm input", stream, swapped_by=("layernorm",))]
                if s.model.sandwich_norm
                else []
            ),
        ],
    )
    counts = counts + _experts(s, load)
    if s.model.shared_expert_ffn_hidden_size:
        counts = counts + two_matrices(
            s, s.model.shared_expert_ffn_hidden_size, "shared_expert", ("shared_experts", "moe")
        )
    return counts


def routed_rows(s: Shapes, load: Array = 1.0) -> Array:
    """Token–expert pairs that one rank computes."""
    return s.shard * s.moe.top_k * s.layout.etp * load


def _router(s: Shapes) -> list[Operator]:
    """Logits in float32, scores, choice and the auxiliary loss: some passes over
    `[shard, experts]`. PyTorch's kernels are many short ones, with hidden states cast to float32
    for products that run outside the matrix units, and a scan of every row (of every group) that
    settles ties."""
    width = router_rows(s.model, s.moe)
    scores = 4.0 * s.shard * s.model.num_experts
    shape = {
        "m": s.shard,
        "n": width,
        "k": s.model.hidden_size,
        "dtype": "fp32" if s.dtype == "fp32" or s.torch_kernels else "bf16",
    }
    flops = 2.0 * s.shard * width * s.model.hidden_size
    read = s.shard * s.model.hidden_size * s.element + 4.0 * s.shard * width
    names: tuple[Any, ...] = ("forward", "input_gradient", "weight_gradient")
    logits = [
        Operator(
            "moe.router", phase, "matmul", flops, read, shape, ROUTE if phase == "forward" else ""
        )
        for phase in names
    ]
    if not s.torch_kernels:
        return [*logits, *vector("moe.choice", 6 * scores, 4 * scores, ROUTE)]
    wide = 6.0 * s.shard * s.model.hidden_size
    scanned = s.shard * s.moe.equal_groups
    return [
        *logits,
        *vector("moe.router cast", wide, 2 * wide, ROUTE),
        *vector("moe.choice", 2 * scores, 2 * scores, ROUTE, SHORT_KERNELS),
        *vector("moe.plan", 16.0 * s.shard * s.moe.top_k, 0.0, ROUTE, SHORT_KERNELS),
        *vector("moe.ties", SCAN_BYTES_PER_ROW * scanned, 0.0, ROUTE),
    ]


def _experts(s: Shapes, load: Array) -> Counts:
    model, layout, element = s.model, s.layout, s.element
    hidden, module, chunks = model.hidden_size, "moe", s.moe.dispatch_chunks
    fc1, fc2 = mlp_linears(model, model.moe_ffn_hidden_size, "experts")
    rows = routed_rows(s, load)
    sent = s.shard * s.moe.top_k * hidden * element  # by one rank to all others
    received = rows * hidden * element
    inner = rows * fc1.local_outputs(layout.etp) * element
    outer = rows * fc2.local_inputs(layout.etp)
    stream = s.shard * hidden * element
    one = _operators(s, rows / chunks, stream / chunks, sent / chunks)
    peak = received + np.maximum(_regrouped(s, received), inner + outer * element)
    # One chunk computes; of the one before and the one behind it gradients are under way.
    peak = (peak + min(chunks - 1, 2) * (received + sent)) / chunks + 2 * stream
    return Counts(
        [each for operator in one for each in _in_chunks(s, operator)],
        exchange(s, sent, load),
        saved=[
            Saved("experts.fc1 input", rows * hidden * s.linear_element, ROUTE),
            Saved("experts.fc1 output", inner, FC1),
            Saved("experts.activation output", outer * s.linear_element, ACTIVATION),
            Saved("moe.permutation", 12.0 * s.shard * s.moe.top_k, (module,)),
        ],
        backward_peak=peak,
        matrices={fc1.name: fc1.matrix(layout.etp), fc2.name: fc2.matrix(layout.etp)},
    )


def _operators(s: Shapes, rows: Array, stream: Array, sent: Array) -> list[Operator]:
    """Of one chunk of tokens (`stream` bytes, `sent` as rows) and the `rows` that arrive of it."""
    model, layout, module = s.model, s.layout, "moe"
    fc1, fc2 = mlp_linears(model, model.moe_ffn_hidden_size, "experts")
    experts = model.num_experts / layout.ep
    received = rows * model.hidden_size * s.element
    inner = rows * fc1.local_outputs(layout.etp) * s.element
    outer = rows * fc2.local_inputs(layout.etp) * s.element
    regroup = 2 * _regrouped(s, received)
    padded = vector("experts.padding", 4 * received, 4 * received, module)
    return [
        *vector("moe.permute", gathered(s, stream, sent), summed(s, stream, sent), ROUTE),
        *vector("moe.sort", regroup, regroup, ROUTE),
        *(padded if s.traits.padded_experts else []),
        *grouped_matmul(s, fc1, experts, rows / experts, layout.etp, FC1),
        *_between_products(s, inner, outer),
        *grouped_matmul(s, fc2, experts, rows / experts, layout.etp, module),
        *_bias(s, rows * model.hidden_size),
        *vector("moe.unsort", regroup, regroup, module),
        *vector("moe.unpermute", summed(s, stream, sent), gathered(s, stream, sent), module),
    ]


def _in_chunks(s: Shapes, one: Operator) -> list[Operator]:
    """What one chunk takes, of all. Their weight gradients are added up in the product's precision,
    and the sum once to the main gradient."""
    chunks, main = s.moe.dispatch_chunks, " gradient added"
    if chunks == 1 or not one.name.endswith(main):
        return [replace(one, count=one.count * chunks)]
    elements = one.bytes / added_bytes(s)
    moved, name = 3 * s.element * elements, one.name.removesuffix(main) + " chunks added"
    return [one, replace(one, name=name, bytes=moved, shape={"bytes": moved}, count=chunks - 1)]


def _regrouped(s: Shapes, received: Array) -> Array:
    """Bytes that are sorted by expert after the exchange; gathered tokens and such that stay are
    sorted once."""
    again = (s.model.num_experts / s.layout.ep > 1) & np.logical_not(
        uses(s, "local", "allgather", "moge")
    )
    return np.where(again, received, 0.0)


def _between_products(s: Shapes, inner: Array, outer: Array) -> list[Operator]:
    """The activation function, from `inner` bytes to `outer`. Clamping reads and writes both
    halves and joins them again; its gradient reads the clamped tensor too."""
    if s.traits.fused_experts:
        return []
    operators = vector("experts.activation", inner + outer, 2 * inner + outer, ACTIVATION)
    if s.traits.clamped_experts:
        operators += vector("experts.clamp", 4 * inner, 5 * inner, ACTIVATION)
    return operators


def _bias(s: Shapes, elements: Array) -> list[Operator]:
    """Adding the second product's bias, weighted by the router's probabilities (`elements` in
    all), expert by expert: megatron-core's `_apply_bias` in its own passes. What sends a
    token once to a node has probabilities in float32, to which everything is promoted, and cast
    back."""
    if s.traits.fused_experts or not (s.model.add_mlp_bias and s.traits.grouped_experts):
        return []
    element = s.element
    wide = 4.0 if s.traits.node_forwarding else element
    cast = element + wide if wide > element else 0.0
    # product, sum and concatenation; backward two products, each summed, and a concatenation
    forward = wide + (element + 2 * wide) + 2 * wide + cast
    backward = 2 * cast + 6 * wide + 2 * element
    return vector("experts.bias", forward * elements, backward * elements, "moe")
