"""Self-attention: grouped-query and multi-head latent, with context parallelism."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.counts.records import (
    Counts,
    Message,
    Operator,
    Saved,
    Shapes,
    matmul,
    total,
    vector,
)
from simulator.counts.tensor_parallel import after_row, before_column
from simulator.counts.torch_kernels import norm, rope
from simulator.parameters import attention_linears, qk_size, query_groups, v_size

Array = Any


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
        saved=[Saved("attention.post_norm input", stream)] if s.model.sandwich_norm else [],
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
        Saved("attention.norm input", stream),
        Saved("attention.norm output", s.shard * hidden * s.linear_element, ("layernorm",)),
        Saved("attention.norm statistics", 4.0 * s.shard),
        Saved("attention.query_key_value", s.tokens * heads * element),
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
    if model.qk_layernorm:
        operators += vector("attention.latent_norm", 2 * compressed, 3 * compressed, up)
    # split into heads, rotate, and put rotated and plain parts together again
    joined = 2 * query + key_value + query + value
    operators += vector("attention.rope", joined, joined, up)
    messages += before_column(s, "attention.rotary_key", model.qk_pos_emb_head_dim, up)
    kv_down = s.shard * (model.kv_lora_rank + model.qk_pos_emb_head_dim) * element
    q_down = s.shard * model.q_lora_rank * element
    saved = [
        Saved("attention.norm input", stream),
        Saved("attention.norm output", s.shard * hidden * s.linear_element, ("layernorm",)),
        Saved("attention.norm statistics", 4.0 * s.shard),
        Saved("attention.compressed", kv_down + q_down),
        Saved("attention.latent_norm output", compressed, (up,)),
        Saved("attention.query", query, (up,)),
        Saved("attention.key", query, (up,)),
        Saved("attention.value", value, (up,)),
    ]
    return Counts(operators, messages, saved)


def _core(s: Shapes) -> Counts:
    """Scores, softmax and weighted values, and what context parallelism moves around them."""
    model, layout, element = s.model, s.layout, s.element
    heads = model.num_attention_heads / layout.tp
    kv_heads = np.maximum(query_groups(model) / layout.tp, 1)
    qk, v = qk_size(model), v_size(model)
    shape = {
        "batch": layout.micro_batch,
        "heads": heads / layout.cp,
        "seq_q": s.seq_length,
        "seq_kv": s.seq_length,
        "qk_dim": qk,
        "v_dim": max(qk, v) if s.traits.padded_values else v,
        "kv_heads": np.maximum(kv_heads / layout.cp, 1),
        "fused": s.traits.fused_attention,
        "passes": s.vector_passes,
        "flash_2": s.traits.flash_attention_2,
        "dtype": "bf16" if s.dtype in ("fp8", "int8") and not s.traits.fp8_attention else s.dtype,
    }
    pairs = layout.micro_batch * heads / layout.cp * s.seq_length**2
    masked = 0.5 if s.traits.fused_attention else 1.0
    flops = 2.0 * pairs * (qk + v) * masked
    extra = 2.0 * pairs * qk * masked if s.traits.fused_attention else 0.0
    values = s.tokens * heads * v * element
    moved = s.tokens * (heads * qk + kv_heads * (qk + v)) * element + values
    scores = 0.0 if s.traits.fused_attention else 2.0 * element * pairs
    operators = [
        Operator(
            "attention.core",
            "forward",
            "attention",
            flops,
            moved + scores,
            shape | {"backward": False},
            "core_attn",
        ),
        Operator(
            "attention.core",
            "input_gradient",
            "attention",
            2 * flops + extra,
            2 * (moved + scores),
            shape | {"backward": True},
        ),
    ]
    if shape["dtype"] == "fp8":  # operands, and the output's gradient, cast for both directions
        cast = element + 2 * s.linear_element
        inputs = s.tokens * (heads * qk + kv_heads * (qk + v))
        operators += vector("attention.core quantised", inputs * cast, values / element * cast)
    ring = np.where(layout.ring, 1, 0)
    keys_values = s.tokens * kv_heads * (qk + v) * element * (layout.cp - 1)
    by_all_to_all = np.where((layout.cp > 1) & (ring == 0), 1, 0)
    # Fewer key/value heads than ranks are repeated, so that each rank gets some.
    common = np.gcd(np.asarray(kv_heads, dtype=int), np.asarray(layout.cp, dtype=int))
    sent = kv_heads * np.where(by_all_to_all, layout.cp / common, 1)
    exchanged = {
        "queries": s.tokens * heads * qk * element,
        "keys": s.tokens * sent * qk * element,
        "values": s.tokens * sent * v * element,
        "output": values,
    }
    to_heads = total(exchanged.values()) - values
    # Each is put in order by rank before it is sent, and in order of positions on arrival.
    rearranged = 4 * (to_heads + values)
    operators += vector(
        "attention.exchange copies", rearranged, rearranged, "core_attn", by_all_to_all
    )
    messages = []
    for phase, back in (("forward", 1.0), ("input_gradient", 2.0)):
        again = "core_attn" if phase == "forward" else ""
        messages += [
            Message(
                "attention ring",
                phase,  # type: ignore[arg-type]
                "send_recv",
                "cp",
                keys_values * back,
                f"attention.core:{phase}",
                again,
                ring,
            ),
            *(
                Message(
                    f"attention {name}",
                    phase,  # type: ignore[arg-type]
                    "all_to_all",
                    "cp",
                    moved_bytes,
                    "",
                    again,
                    by_all_to_all,
                )
                for name, moved_bytes in exchanged.items()
            ),
        ]
    # Exchanged by all-to-all, the output exists twice: by heads for attention's backward, and by
    # sequence as the input of the output projection.
    twice = by_all_to_all * values
    saved = [
        Saved("attention.output", s.tokens * heads * v * element),
        Saved("attention.output by heads", twice, ("core_attn",)),
    ]
    if s.traits.fused_attention:
        saved.append(Saved("attention.softmax statistics", 4.0 * s.tokens * heads, ("core_attn",)))
        peak = 3 * to_heads
    else:
        saved.append(Saved("attention.probabilities", pairs * element, ("core_attn",)))
        peak = 2 * pairs * element
    return Counts(operators, messages, saved, backward_peak=peak)
