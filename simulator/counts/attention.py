"""Self-attention: grouped-query and multi-head latent, with context parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.array import Array
from simulator.counts.records import (
    Counts,
    Message,
    Operator,
    Phase,
    Saved,
    Shapes,
    matmul,
    total,
    vector,
)
from simulator.counts.tensor_parallel import after_row, before_column
from simulator.counts.torch_kernels import norm, rope
from simulator.parameters import attention_linears, qk_size, query_groups, v_size

NORM, CORE = ("layernorm",), ("core_attn",)


def attention(s: Shapes) -> Counts:
    """Norm, projections, core attention and output projection, with the residual addition."""
    projections = _latent(s) if s.model.attention == "mla" else _grouped_query(s)
    linears = attention_linears(s.model)
    output = linears[-1]
    hidden, element = s.model.hidden_size, s.element
    stream = s.shard * hidden * element
    tp = s.layout.tp
    after = Counts(
        operators=[
            *matmul(s, output, s.tokens, tp),
            *vector("attention.residual", 3 * stream, stream),
            *(norm(s, "attention.post_norm", s.shard, hidden) if s.model.sandwich_norm else []),
        ],
        messages=after_row(s, output.name, hidden),
        saved=[Saved("attention.post_norm input", stream, swapped_by=NORM)]
        if s.model.sandwich_norm
        else [],
        matrices={linear.name: linear.matrix(tp) for linear in linears},
    )
    return projections + _core(s) + after


def _grouped_query(s: Shapes) -> Counts:
    linear = attention_linears(s.model)[0]
    hidden, element, tp = s.model.hidden_size, s.element, s.layout.tp
    stream = s.shard * hidden * element
    heads = linear.local_outputs(tp)  # queries, keys and values of this rank
    every = s.tokens * heads * element
    values = np.maximum(query_groups(s.model) / tp, 1) * v_size(s.model)
    rotated = every - s.tokens * values * element
    operators = [
        *norm(s, "attention.norm", s.shard, hidden, "layernorm"),
        *matmul(s, linear, s.tokens, tp),
    ]
    if s.model.position_embedding == "rope":
        operators += rope(s, every, rotated)
    if s.model.qk_layernorm:
        size = qk_size(s.model)
        operators += norm(s, "attention.qk_norm", rotated / (size * element), size)
    saved = [
        Saved("attention.norm input", stream, swapped_by=NORM),
        Saved("attention.norm output", s.shard * hidden * s.linear_element, ("layernorm",)),
        Saved("attention.norm statistics", 4.0 * s.shard),
        Saved("attention.query_key_value", s.tokens * heads * element, swapped_by=CORE),
    ]
    if s.model.qk_layernorm:
        saved.append(Saved("attention.qk_norm input", s.tokens * heads * element * 0.8))
    return Counts(operators, before_column(s, linear.name, hidden), saved)


def _latent(s: Shapes) -> Counts:
    """Down-projections run on the sequence shard and are replicated over tensor parallelism; what
    is gathered is the compressed query, key/value and rotary key."""
    model, tp, element = s.model, s.layout.tp, s.element
    hidden = model.hidden_size
    stream = s.shard * hidden * element
    up = "mla_up_proj"
    heads = model.num_attention_heads / tp
    query = s.tokens * heads * qk_size(model) * element
    value = s.tokens * heads * model.v_head_dim * element
    key_value = s.tokens * heads * (model.qk_head_dim + model.v_head_dim) * element
    operators = norm(s, "attention.norm", s.shard, hidden, "layernorm")
    messages: list[Message] = []
    compressed = s.shard * (model.q_lora_rank + model.kv_lora_rank) * element
    for linear in attention_linears(model)[:-1]:
        if linear.split == "replicated":
            operators += matmul(s, linear, s.shard, 1)
        else:
            operators += matmul(s, linear, s.tokens, tp, up)
            messages += before_column(s, linear.name, linear.inputs, up)
    # Its norms are part of the products where TransformerEngine fuses them, and then made again.
    normed = (up,) if s.traits.transformer_engine else ()
    if model.qk_layernorm:
        operators += vector("attention.latent_norm", 2 * compressed, 3 * compressed, normed or "")
    # split into heads, rotate, and put rotated and plain parts together again
    joined = 2 * query + key_value + query + value
    operators += vector("attention.rope", joined, joined, up)
    messages += before_column(s, "attention.rotary_key", model.qk_pos_emb_head_dim, up)
    kv_down = s.shard * (model.kv_lora_rank + model.qk_pos_emb_head_dim) * element
    q_down = s.shard * model.q_lora_rank * element
    saved = [
        Saved("attention.norm input", stream, swapped_by=NORM),
        Saved("attention.norm output", s.shard * hidden * s.linear_element, ("layernorm",)),
        Saved("attention.norm statistics", 4.0 * s.shard),
        Saved("attention.compressed", kv_down + q_down),
        *([Saved("attention.latent_norm output", compressed, normed)] * model.qk_layernorm),
        Saved("attention.query", query, (up,)),
        Saved("attention.key", query, (up,)),
        Saved("attention.value", value, (up,)),
    ]
    return Counts(operators, messages, saved)


@dataclass(frozen=True)
class _Heads:
    """What a tensor-parallel rank has of attention, by heads, for one micro-batch."""

    heads: Array
    kv_heads: Array
    qk: int
    v: int
    pairs: Array  # of query and key, by head
    output: Array  # bytes


def _heads(s: Shapes) -> _Heads:
    heads = s.model.num_attention_heads / s.layout.tp
    v = v_size(s.model)
    return _Heads(
        heads,
        np.maximum(query_groups(s.model) / s.layout.tp, 1),
        qk_size(s.model),
        v,
        s.layout.micro_batch * heads / s.layout.cp * s.seq_length**2,
        s.tokens * heads * v * s.element,
    )


def _core(s: Shapes) -> Counts:
    """Scores, softmax and weighted values, and what context parallelism moves around them."""
    own, layout = _heads(s), s.layout
    exchanged = _exchanged(s, own)
    to_heads = total(exchanged.values()) - own.output
    by_all_to_all = np.where((layout.cp > 1) & np.logical_not(layout.ring), 1, 0)
    # Each is put in order by rank before it is sent, and in order of positions on arrival.
    rearranged = 4 * (to_heads + own.output)
    copies = vector("attention.exchange copies", rearranged, rearranged, "core_attn", by_all_to_all)
    # Exchanged by all-to-all, the output exists twice: by heads for attention's backward, and by
    # sequence as the input of the output projection.
    saved = [
        Saved("attention.output", s.tokens * own.heads * own.v * s.element, swapped_by=CORE),
        Saved("attention.output by heads", by_all_to_all * own.output, ("core_attn",)),
    ]
    if s.traits.fused_attention:
        statistics = 4.0 * s.tokens * own.heads
        saved.append(Saved("attention.softmax statistics", statistics, ("core_attn",)))
        peak = 3 * to_heads
    else:
        probabilities = own.pairs * s.element
        saved.append(Saved("attention.probabilities", probabilities, ("core_attn",)))
        peak = 2 * own.pairs * s.element
    messages = _core_messages(s, own, exchanged, by_all_to_all)
    return Counts(_core_operators(s, own) + copies, messages, saved, backward_peak=peak)


def _core_operators(s: Shapes, own: _Heads) -> list[Operator]:
    layout, traits = s.layout, s.traits
    shape = {
        "batch": layout.micro_batch,
        "heads": own.heads / layout.cp,
        "seq_q": s.seq_length,
        "seq_kv": s.seq_length,
        "qk_dim": own.qk,
        "v_dim": max(own.qk, own.v) if traits.padded_values else own.v,
        "kv_heads": np.maximum(own.kv_heads / layout.cp, 1),
        "fused": traits.fused_attention,
        "passes": s.vector_passes,
        "flash_2": traits.flash_attention_2,
        "dtype": "bf16" if s.dtype in ("fp8", "int8") and not traits.fp8_attention else s.dtype,
    }
    masked = 0.5 if traits.fused_attention else 1.0
    flops = 2.0 * own.pairs * (own.qk + own.v) * masked
    extra = 2.0 * own.pairs * own.qk * masked if traits.fused_attention else 0.0
    inputs = s.tokens * (own.heads * own.qk + own.kv_heads * (own.qk + own.v))
    scores = 0.0 if traits.fused_attention else 2.0 * s.element * own.pairs
    moved = inputs * s.element + own.output + scores
    name = "attention.core"
    forward = shape | {"backward": False}
    backward = shape | {"backward": True}
    operators = [
        Operator(name, "forward", "attention", flops, moved, forward, "core_attn"),
        Operator(name, "input_gradient", "attention", 2 * flops + extra, 2 * moved, backward),
    ]
    if shape["dtype"] == "fp8":  # operands, and the output's gradient, cast for both directions
        cast = s.element + 2 * s.linear_element
        operators += vector(f"{name} quantised", inputs * cast, own.output / s.element * cast)
    return operators


def _exchanged(s: Shapes, own: _Heads) -> dict[str, Array]:
    """Bytes that an all-to-all over the context-parallel ranks moves, by what they are."""
    layout = s.layout
    # Fewer key/value heads than ranks are repeated, so that each rank gets some.
    common = np.gcd(np.asarray(own.kv_heads, dtype=int), np.asarray(layout.cp, dtype=int))
    by_all_to_all = (layout.cp > 1) & np.logical_not(layout.ring)
    sent = own.kv_heads * np.where(by_all_to_all, layout.cp / common, 1)
    return {
        "queries": s.tokens * own.heads * own.qk * s.element,
        "keys": s.tokens * sent * own.qk * s.element,
        "values": s.tokens * sent * own.v * s.element,
        "output": own.output,
    }


def _core_messages(
    s: Shapes, own: _Heads, exchanged: dict[str, Array], by_all_to_all: Array
) -> list[Message]:
    """Keys and values round a ring, or heads for positions and back."""
    ring = np.where(s.layout.ring, 1, 0)
    kv_bytes = s.tokens * own.kv_heads * (own.qk + own.v) * s.element
    round_ring = kv_bytes * (s.layout.cp - 1)
    messages = []
    phases: tuple[tuple[Phase, float, str], ...] = (
        ("forward", 1.0, "core_attn"),
        ("input_gradient", 2.0, ""),
    )
    for phase, back, again in phases:
        beside = f"attention.core:{phase}"
        volume = round_ring * back
        messages.append(
            Message("attention ring", phase, "send_recv", "cp", volume, beside, again, ring)
        )
        messages += [
            Message(f"attention {name}", phase, "all_to_all", "cp", size, "", again, by_all_to_all)
            for name, size in exchanged.items()
        ]
    return messages
