"""The two ends of the model: embedding, and final norm, projection and loss; and MTP."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from configs.head_chunks import head_chunks
from simulator.array import Array
from simulator.counts.records import Counts, Message, Saved, Shapes, matmul, vector
from simulator.counts.tensor_parallel import before_column
from simulator.counts.torch_kernels import norm
from simulator.parameters import Linear, mtp_projection


def embedding(s: Shapes) -> Counts:
    """Look-up in a table cut over tensor-parallel ranks, summed by reduce-scatter."""
    hidden, element = s.model.hidden_size, s.element
    states = s.tokens * hidden * element
    parallel = np.where(s.layout.sequence_parallel, 1, 0)
    # The gradient of the table is cleared, added to, and then added to the main gradients.
    table = s.model.vocab_size / s.layout.tp * hidden * (2 * element + 8.0)
    return Counts(
        operators=vector("embedding", 2 * states, 2 * states + table),
        messages=[
            Message("embedding", "forward", "reduce_scatter", "tp", states, "", "", parallel),
            Message("embedding", "forward", "all_reduce", "tp", states, "", "", 1 - parallel),
            Message("embedding", "input_gradient", "all_gather", "tp", states, "", "", parallel),
        ],
        saved=[Saved("embedding.tokens", 8.0 * s.tokens)],
    )


def embedding_gradient(s: Shapes) -> Array:
    """Bytes of the table's gradient, which the look-up's backward writes before it is added to
    the main gradients."""
    return s.model.vocab_size / s.layout.tp * s.model.hidden_size * s.element


def head(s: Shapes) -> Counts:
    """Final norm, projection on the vocabulary and cross-entropy over its tensor-parallel parts."""
    hidden, element, tp = s.model.hidden_size, s.element, s.layout.tp
    stream = s.shard * hidden * element
    linear = Linear("head", hidden, s.model.vocab_size, "column")
    # Quantised training keeps the projection on the vocabulary in 16 bits.
    wide = replace(s, dtype="bf16") if s.dtype in ("fp8", "fp4", "int8") else s
    logits = s.tokens * s.model.vocab_size / tp
    forward, backward, held = _loss_passes(s)
    scalars = 3 * 4.0 * s.tokens
    gathered = np.where(np.logical_and(s.layout.tp > 1, s.layout.sequence_parallel), 1, 0)
    states = s.tokens * hidden * element
    matrix = linear.matrix(tp)
    # The gathered input, its gradient, and the placeholder of the matrix's gradient.
    whole = logits * held + states * (1 + gathered) + matrix * element
    peak = np.where(_in_chunks(s), _chunk_peak(s, logits, matrix) + states, whole)
    return Counts(
        operators=[
            *norm(s, "head.norm", s.shard, hidden),
            *matmul(wide, linear, s.tokens, tp),
            *vector("head.loss", forward * logits, backward * logits),
            *vector("head.metrics", s.traits.loss_metrics * 3 * element * logits, 0.0),
        ],
        messages=[
            *before_column(s, "head", hidden),
            Message("head.loss", "forward", "all_reduce", "tp", scalars),
        ],
        saved=[Saved("head.norm input", stream), Saved("head.norm output", stream)],
        backward_peak=peak,
    )


def _in_chunks(s: Shapes) -> Array:
    """Whether logits and loss are made chunk by chunk (`pangu.ops.linear_cross_entropy`)."""
    return (s.layout.tp == 1) & s.traits.chunked_cross_entropy


def _chunk_peak(s: Shapes, logits: Array, matrix: Array) -> Array:
    """Bytes held at once: a chunk's logits and the matrix's gradient, which in 16 bits is added up
    in float32 beside the product of a chunk, where there are several."""
    count = head_chunks(s.tokens, s.model.hidden_size)
    chunk = logits / count
    if s.dtype == "fp32":
        return chunk * s.element + matrix * s.element
    loss = s.element if s.traits.fused_cross_entropy else 4.0 + 2 * s.element
    several = np.where(count > 1, 4.0, 0.0)
    beside_loss = chunk * loss + matrix * several
    return np.maximum(beside_loss, chunk * s.element + matrix * (several + s.element))


def _loss_passes(s: Shapes) -> tuple[Array, Array, Array]:
    """Bytes for each logit: moved forward, moved backward, held at once.

    Fused: read the logits, write the gradient over them. In place: to float32, maximum, subtract,
    exponential, sum; backward scale and cast. megatron-core's own subtracts and divides in copies.
    """
    element, tp = s.element, s.layout.tp
    if s.dtype == "fp32":  # block by block in cache; the engine's, over TP, keeps a copy
        return 6.0, 2.0 * element, element * np.where(tp > 1, 2, 1)
    if s.traits.fused_cross_entropy:
        return 6.0, 2.0 * element, element
    ours = (tp == 1) & s.traits.inplace_cross_entropy
    return np.where(ours, 30.0, 38.0), 14.0, element + np.where(ours, 4.0, 8.0)


def mtp_entrance(s: Shapes) -> Counts:
    """What a multi-token-prediction module adds before its transformer layer: the embedding of the
    next token, two norms, and the projection of [embedding, hidden] to hidden, whose columns are
    gathered and handed on by sequence."""
    hidden, element = s.model.hidden_size, s.element
    stream = s.shard * hidden * element
    states = s.tokens * hidden * element
    by_sequence = np.where(s.layout.sequence_parallel, 1, 0)
    name = "mtp.projection output"
    projection = mtp_projection(s.model)
    return embedding(s) + Counts(
        operators=[
            *norm(s, "mtp.norm", 2 * s.shard, hidden),
            *matmul(s, projection, s.tokens, s.layout.tp),
        ],
        messages=[
            *before_column(s, "mtp.projection", 2 * hidden),
            Message(name, "forward", "all_gather", "tp", states),
            Message(name, "input_gradient", "all_gather", "tp", states, "", "", by_sequence),
        ],
        saved=[Saved("mtp.norm input", 2 * stream), Saved("mtp.norm output", 2 * stream)],
        backward_peak=2 * stream,
        matrices={projection.name: projection.matrix(s.layout.tp)},
    )
