"""A mixture-of-experts layer: router, dispatch, grouped matrices, combine, shared expert.

Counts assume that every expert-parallel rank receives its fair share of rows times
`load`: the expected maximum over ranks relative to the mean (1 for MoGE with whole groups).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.counts.mlp import two_matrices
from simulator.counts.records import (
    Counts,
    Message,
    Operator,
    Saved,
    Shapes,
    grouped_matmul,
    vector,
)
from simulator.parameters import mlp_linears

Array = Any


def moe(s: Shapes, load: Array = 1.0) -> Counts:
    """Norm, router, experts and shared expert of one layer, with the residual addition."""
    hidden, element = s.model.hidden_size, s.element
    stream = s.shard * hidden * element
    counts = Counts(
        operators=[
            *vector("moe.norm", 2 * stream, 3 * stream, "layernorm"),
            *_router(s),
            *vector("moe.residual", 3 * stream, stream),
            *(vector("moe.post_norm", 2 * stream, 3 * stream) if s.model.sandwich_norm else []),
        ],
        saved=[
            Saved("moe.norm input", stream),
            Saved("moe.norm output", stream, ("layernorm",)),
            Saved("moe.norm statistics", 4.0 * s.shard),
            Saved("moe.router scores", 8.0 * s.shard * s.model.num_experts, ("moe",)),
            *([Saved("moe.post_norm input", stream)] if s.model.sandwich_norm else []),
        ],
    )
    counts = counts + _experts(s, load)
    if s.model.shared_expert_ffn_hidden_size:
        counts = counts + two_matrices(
            s, s.model.shared_expert_ffn_hidden_size, "shared_expert", "shared_experts"
        )
    return counts


def routed_rows(s: Shapes, load: Array = 1.0) -> Array:
    """Token–expert pairs that one rank computes."""
    return s.shard * s.moe.top_k * s.layout.etp * load


def _router(s: Shapes) -> list[Operator]:
    """Logits in float32, scores, choice and the auxiliary loss: some passes over
    `[shard, experts]`."""
    scores = 4.0 * s.shard * s.model.num_experts
    shape = {
        "m": s.shard,
        "n": s.model.num_experts,
        "k": s.model.hidden_size,
        "dtype": "fp32" if s.dtype == "fp32" else "bf16",
    }
    flops = 2.0 * s.shard * s.model.num_experts * s.model.hidden_size
    read = s.shard * s.model.hidden_size * s.element + scores
    names: tuple[Any, ...] = ("forward", "input_gradient", "weight_gradient")
    logits = [
        Operator("moe.router", phase, "matmul", flops, read, shape, "moe" * (phase == "forward"))
        for phase in names
    ]
    return [*logits, *vector("moe.choice", 6 * scores, 4 * scores, "moe")]


def _experts(s: Shapes, load: Array) -> Counts:
    model, layout, element = s.model, s.layout, s.element
    hidden, module = model.hidden_size, "moe"
    fc1, fc2 = mlp_linears(model, model.moe_ffn_hidden_size, "experts")
    experts = model.num_experts / layout.ep
    rows = routed_rows(s, load)
    sent = s.shard * s.moe.top_k * hidden * element  # by one rank to all others
    received = rows * hidden * element
    inner = rows * fc1.local_outputs(layout.etp) * element
    outer = rows * fc2.local_inputs(layout.etp)
    stream = s.shard * hidden * element
    regroup = np.where(experts > 1, 2 * received, 0.0)  # by expert, after the exchange
    operators = [
        *vector("moe.permute", stream + sent, stream + sent, module),
        *vector("moe.sort", regroup, regroup, module),
        *grouped_matmul(s, fc1, experts, rows / experts, layout.etp, module),
        *vector("experts.activation", inner + outer * element, 2 * inner + outer * element, module),
        *grouped_matmul(s, fc2, experts, rows / experts, layout.etp, module),
        *vector("moe.unsort", regroup, regroup, module),
        *vector("moe.unpermute", stream + sent, stream + sent, module),
    ]
    operators = [_also(operator) for operator in operators]
    exchange = regroup / 2
    peak = received + np.maximum(exchange, inner + outer * element) + 2 * stream
    return Counts(
        operators,
        _exchange(s, sent, load),
        saved=[
            Saved("experts.fc1 input", rows * hidden * s.linear_element, (module,)),
            Saved("experts.fc1 output", inner, (module,)),
            Saved("experts.activation output", outer * s.linear_element, (module, "moe_act")),
            Saved("moe.permutation", 12.0 * s.shard * s.moe.top_k, (module,)),
        ],
        backward_peak=peak,
        matrices={fc1.name: fc1.matrix(layout.etp), fc2.name: fc2.matrix(layout.etp)},
    )


def _also(operator: Operator) -> Operator:
    """The activation function is repeated by `moe_act` too, which alone repeats nothing else."""
    if operator.name != "experts.activation" or operator.phase != "forward":
        return operator
    return Operator(**(vars(operator) | {"recompute": "moe_act|moe"}))


def _exchange(s: Shapes, sent: Array, load: Array) -> list[Message]:
    """Dispatch and combine, forward and backward.

    Expert tensor parallelism gathers the rows of its group after the dispatch and reduces them
    before the combine. Hierarchical dispatch gathers hidden states over the expert group's nodes
    and exchanges inside a node.
    """
    layout = s.layout
    sharded = np.where(np.asarray(layout.etp) > 1, 1, 0)
    within = sent * layout.etp
    messages = []
    gather = s.moe.dispatcher == "allgather"
    everyone = s.shard * s.model.hidden_size * s.element * layout.ep * layout.etp
    names: tuple[Any, ...] = ("forward", "input_gradient")
    for phase in names:
        again = "moe" if phase == "forward" else ""
        for name, collective in (("dispatch", "all_gather"), ("combine", "reduce_scatter")):
            if phase == "input_gradient":
                collective = "reduce_scatter" if name == "dispatch" else "all_gather"
            kind: Any = collective
            if gather:
                messages.append(Message(f"moe.{name}", phase, kind, "expert", everyone, "", again))
                continue
            messages.append(
                Message(f"moe.{name}", phase, "all_to_all", "ep", sent * load, "", again)
            )
            messages.append(
                Message(f"moe.{name} within", phase, kind, "etp", within * load, "", again, sharded)
            )
    return messages
