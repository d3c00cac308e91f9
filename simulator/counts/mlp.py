"""The MLP of a dense layer, and a shared expert, which is the same thing without a norm."""

from __future__ import annotations

from simulator.counts.records import Counts, Modules, Saved, Shapes, matmul, vector
from simulator.counts.tensor_parallel import after_row, before_column
from simulator.counts.torch_kernels import norm
from simulator.parameters import mlp_linears


def dense_mlp(s: Shapes) -> Counts:
    """Norm, two matrices around the activation function, and the residual addition."""
    hidden, element = s.model.hidden_size, s.element
    stream = s.shard * hidden * element
    # Recomputing the whole MLP repeats the norm only where it is recomputed itself.
    around = Counts(
        operators=[
            *norm(s, "mlp.norm", s.shard, hidden, "layernorm"),
            *vector("mlp.residual", 3 * stream, stream),
            *(norm(s, "mlp.post_norm", s.shard, hidden) if s.model.sandwich_norm else []),
        ],
        saved=[
            Saved("mlp.norm input", stream, swapped_by=("layernorm",)),
            Saved("mlp.norm output", s.shard * hidden * s.linear_element, ("layernorm",)),
            Saved("mlp.norm statistics", 4.0 * s.shard),
            *(
                [Saved("mlp.post_norm input", stream, swapped_by=("layernorm",))]
                if s.model.sandwich_norm
                else []
            ),
        ],
    )
    return around + two_matrices(s, s.model.ffn_hidden_size, "mlp", "mlp")


def two_matrices(s: Shapes, width: int, name: str, module: Modules) -> Counts:
    """fc1, activation function, fc2 of an MLP over the tensor-parallel group; recomputed or
    swapped with `module`, or any of several."""
    modules = (module,) if isinstance(module, str) else module
    tp, element = s.layout.tp, s.element
    fc1, fc2 = mlp_linears(s.model, width, name)
    inner = s.tokens * fc1.local_outputs(tp) * element
    outer = s.tokens * fc2.local_inputs(tp)
    stream = s.shard * s.model.hidden_size * element
    return Counts(
        operators=[
            *matmul(s, fc1, s.tokens, tp, module),
            *vector(
                f"{name}.activation",
                inner + outer * element,
                2 * inner + outer * element,
                module,
            ),
            *matmul(s, fc2, s.tokens, tp, module),
        ],
        messages=before_column(s, fc1.name, s.model.hidden_size, module)
        + after_row(s, fc2.name, s.model.hidden_size, module),
        saved=[
            Saved(f"{name}.fc1 output", inner, modules),
            Saved(f"{name}.activation output", outer * s.linear_element, modules),
        ],
        # gradients of the residual stream, of the layer's output, and of fc1's output at the
        # moment when the activation function's input gradient has just been written
        backward_peak=inner + 2 * stream,
        matrices={fc1.name: fc1.matrix(tp), fc2.name: fc2.matrix(tp)},
    )
