"""Serving: time of prefill and of decoding steps, memory, and the largest batch within limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from simulator.array import Array
from simulator.cached_keys import cache_bytes_per_token, keeps_latents, kept_heads
from simulator.collectives import collective_seconds
from simulator.counts.records import total
from simulator.decoding_host import layers_seconds, once_seconds, touched_experts
from simulator.hardware import ELEMENT_BYTES, Hardware
from simulator.imbalance import routing_factor, straggler_factor
from simulator.input_transforms import transform_seconds
from simulator.moesd import sigma
from simulator.operators import (
    attention_seconds,
    grouped_matmul_seconds,
    matmul_seconds,
    vector_seconds,
)
from simulator.parameters import (
    Linear,
    attention_linears,
    count_parameters,
    layer_counts,
    matmul_parameters_per_token,
    mlp_linears,
    mtp_kind,
    qk_size,
    query_groups,
    router_rows,
    v_size,
)
from simulator.serving import Serving


@dataclass(frozen=True)
class Step:
    """Seconds of one pass over the whole model, by part; arrays over the batch."""

    parts: dict[str, Array]

    @property
    def seconds(self) -> Array:
        return sum(self.parts.values())


@dataclass(frozen=True)
class ServingForecast:
    """What serving `batch` sequences gives; see `forecast`."""

    batch: int
    ttft_seconds: float
    tpot_seconds: float
    tokens_per_second_per_device: float
    memory_gib: float
    fits: bool
    prefill: Step
    decode: Step


def decode_step(
    serving: Serving, batch: Array, context: Array, tokens_per_sequence: Array = 1
) -> Step:
    """One decoding step of `batch` sequences in all, each with `context` cached positions.

    `tokens_per_sequence` new tokens of every sequence pass through the model together: one in
    plain decoding, more when drafted tokens are verified or when several continuations share a
    cache.
    """
    batch, context = np.asarray(batch, dtype=float), np.asarray(context, dtype=float)
    new = np.asarray(tokens_per_sequence, dtype=float)
    local = np.ceil(batch / serving.attention_dp)

    def attend() -> Array:
        return _cached_attention(serving, local, new, context)

    step = _pass(
        serving, tokens=batch * new, local=local * new, heads_on=batch * new, attend=attend
    )
    return _with_host(serving, step, local, new)


def prefill(serving: Serving, batch: Array, length: Array) -> Step:
    """The first pass over `batch` prompts of `length` tokens, to the first token of each."""
    batch, length = np.asarray(batch, dtype=float), np.asarray(length, dtype=float)
    local = np.ceil(batch / serving.attention_dp)
    model = serving.model

    def attend() -> Array:
        return attention_seconds(
            serving.hardware,
            batch=local,
            heads=model.num_attention_heads / serving.tp,
            kv_heads=max(query_groups(model) / serving.tp, 1),
            seq_q=length,
            seq_kv=length,
            qk_dim=qk_size(model),
            v_dim=v_size(model),
            dtype=_attention_dtype(serving),
        )

    step = _pass(
        serving, tokens=batch * length, local=local * length, heads_on=batch, attend=attend
    )
    return _with_host(serving, step, local, length)


def forecast(serving: Serving, batch: int) -> ServingForecast:
    """Latency and throughput of `batch` sequences of `prompt_length` and `max_new_tokens` tokens.

    The cache holds the prompt and, on average, half of the output. With drafting, a step verifies
    `draft_tokens` more tokens of every sequence, each accepted with `acceptance_rate` if all
    before it were; a draft costs one transformer layer, its projection and the head.
    """
    options = serving.options
    first = prefill(serving, batch, options.prompt_length)
    context = options.mean_context
    step = decode_step(serving, batch, context, 1 + options.draft_tokens)
    parts = dict(step.parts)
    if options.draft_tokens:
        parts["draft"] = options.draft_tokens * draft_seconds(serving, batch, context)
        parts["rejection"] = rejection_seconds(serving, batch, options.draft_tokens)
    step = Step(parts)
    most = 1 + options.draft_tokens
    gained = most * float(sigma(options.acceptance_rate, options.draft_tokens))
    tpot = float(step.seconds) / gained
    memory = float(memory_bytes(serving, batch)) / 2**30
    return ServingForecast(
        batch=batch,
        ttft_seconds=float(first.seconds),
        tpot_seconds=tpot,
        tokens_per_second_per_device=batch / tpot / serving.devices,
        memory_gib=memory,
        fits=memory <= usable_bytes(serving) / 2**30,
        prefill=first,
        decode=step,
    )


def draft_seconds(serving: Serving, batch: Array, context: Array) -> Array:
    """Drafting one token of every sequence: a step of the drafting model on the sequences of one
    device, and what samples from it; one layer of the model's last kind, its projection and the
    head for multi-token prediction; nothing where the prompt is looked up."""
    model = serving.model
    if serving.options.draft == "ngram":
        return np.zeros(np.shape(batch))
    if draft := serving.draft:
        share = np.ceil(np.asarray(batch, dtype=float) / serving.devices)
        return decode_step(draft, share, context).seconds + _sampling_seconds(draft, share)
    step = decode_step(serving, batch, context)
    matrices = matmul_parameters_per_token(model, serving.moe, mtp_kind(model))
    rest = step.parts["head"] + step.parts.get("host", 0.0)
    layer = (step.seconds - rest) / model.num_layers
    projection = 2.0 * model.hidden_size**2 / matrices
    return layer * (1 + projection) + rest


def rejection_seconds(serving: Serving, batch: Array, draft_tokens: Array) -> Array:
    """Probabilities of every verified and drafted token, what of them is accepted, and one more
    sampled from what is left (T_reject)."""
    rows = np.asarray(batch, dtype=float) * (2.0 * np.asarray(draft_tokens) + 1.0)
    return 2 * _sampling_seconds(serving, rows) + serving.options.host_ms / 1e3


def _sampling_seconds(serving: Serving, rows: Array) -> Array:
    """A softmax over float32 logits, and a choice from it."""
    return 2 * vector_seconds(serving.hardware, 8.0 * rows * serving.model.vocab_size)


def memory_bytes(serving: Serving, batch: Array) -> Array:
    """Weights, cache at its longest, and the widest activations, on one device."""
    model, options = serving.model, serving.options
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    matrices = count_parameters(serving.config).total - vocabulary
    if options.draft_tokens and options.draft == "mtp":
        matrices += count_parameters(serving.config).mtp
    weights = matrices * ELEMENT_BYTES[options.weight_dtype] + vocabulary * _element(serving)
    length = options.prompt_length + options.max_new_tokens
    cached = cache_bytes_per_token(serving) * model.num_layers * length
    local = np.ceil(np.asarray(batch) / serving.attention_dp)
    # Logits in float32 and a few tensors of hidden size for the tokens of one step.
    tokens = np.asarray(batch) * (1 + options.draft_tokens)
    widest = tokens * (4.0 * model.vocab_size / serving.devices + 16.0 * model.hidden_size)
    drafting: Array = 0.0
    if serving.draft and options.draft_tokens:
        drafting = memory_bytes(serving.draft, np.ceil(np.asarray(batch) / serving.devices))
    return weights / serving.devices + cached * local + widest + drafting


def usable_bytes(serving: Serving) -> float:
    """Memory left after what the runtime keeps for itself (about 6 %)."""
    return 0.94 * serving.hardware.memory_bytes


def largest_batch(serving: Serving) -> tuple[int, str]:
    """The most sequences that fit memory and the latency limit, in multiples of the attention
    groups, and which of the two stops it. 0: none does."""
    options, step = serving.options, serving.attention_dp
    fits = _largest(step, lambda b: float(memory_bytes(serving, b)) <= usable_bytes(serving))
    limit = options.latency_limit_ms
    if not limit:
        return fits, "memory"
    quick = _largest(step, lambda b: 1e3 * forecast(serving, b).tpot_seconds <= limit)
    return min(fits, quick), "memory" if fits <= quick else "latency"


def _largest(step: int, allowed: Callable[[int], bool]) -> int:
    high = step
    while high < 2**20 and allowed(high):
        high *= 2
    low = high // 2 if high > step else 0
    while high - low > step:
        middle = (low + high) // 2 // step * step
        if middle == low:
            break
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def _pass(
    serving: Serving, tokens: Array, local: Array, heads_on: Array, attend: Callable[[], Array]
) -> Step:
    """Every layer once: `tokens` in all, `local` of them in each attention group; the vocabulary
    projection is applied to `heads_on` tokens."""
    model, hw, n = serving.model, serving.hardware, serving.devices
    counts = layer_counts(model)
    layers = model.num_layers
    projections = sum(_linear(serving, x, local, serving.tp) for x in attention_linears(model))
    parts: dict[str, Array] = {
        "attention": layers * attend(),
        "attention_projections": layers * projections,
        "norms_and_casts": layers * _small_operators(serving, tokens, local),
        "communication": layers * _exchange(serving, tokens, local),
    }
    if counts["dense"]:
        width = model.ffn_hidden_size
        parts["mlp"] = counts["dense"] * _mlp(serving, width, tokens)
    if counts["moe"]:
        parts["experts"] = counts["moe"] * _experts(serving, tokens)
        if width := model.shared_expert_ffn_hidden_size:
            parts["shared_experts"] = counts["moe"] * _mlp(serving, width, tokens)
    if model.patched_layers:
        width = model.hidden_size
        once = matmul_seconds(hw, tokens / n, width, width, dtype=_plain(hw))
        parts["patches"] = len(model.patched_layers) * once
    head = matmul_seconds(hw, heads_on, model.vocab_size / n, model.hidden_size, dtype=_plain(hw))
    element = _element(serving)
    gather = collective_seconds(hw, "all_gather", heads_on * model.vocab_size * element, n)
    parts["head"] = head + gather
    return Step(parts)


def _with_host(serving: Serving, step: Step, sequences: Array, new: Array) -> Step:
    if not (serving.options.host_ms or serving.hardware.decoding):
        return step
    once, layers = once_seconds(serving, sequences), layers_seconds(serving, sequences, new)
    return Step(step.parts | {"host": once, "host_layers": layers})


def _linear(serving: Serving, linear: Linear, tokens: Array, tp: int) -> Array:
    return transform_seconds(serving, linear, tokens, tp) + matmul_seconds(
        serving.hardware,
        tokens,
        linear.local_outputs(tp),
        linear.local_inputs(tp),
        dtype=serving.options.compute_dtype,
        weight_bytes=ELEMENT_BYTES[serving.options.weight_dtype],
    )


def _mlp(serving: Serving, width: int, tokens: Array) -> Array:
    """A dense MLP over all devices, with its activation."""
    n = serving.devices
    products = sum(_linear(serving, x, tokens, n) for x in mlp_linears(serving.model, width))
    activation = 3.0 * _element(serving) * tokens * width / n
    return products + vector_seconds(serving.hardware, activation)


def _experts(serving: Serving, tokens: Array) -> Array:
    """Router and routed experts of the slowest device."""
    model, moe, hw = serving.model, serving.moe, serving.hardware
    chosen = serving.chosen
    if chosen is None:
        factor = routing_factor(moe, model.num_experts, np.maximum(tokens, 1.0), serving.ep)
    else:
        factor = _measured_factor(serving, chosen, np.maximum(tokens, 1.0))
    touched = touched_experts(serving, tokens)
    rows = tokens * moe.top_k / serving.ep * factor
    dtype, weight = serving.options.compute_dtype, ELEMENT_BYTES[serving.options.weight_dtype]
    products: Array = 0.0
    for linear in mlp_linears(model, model.moe_ffn_hidden_size):
        inputs, outputs = linear.local_inputs(serving.etp), linear.local_outputs(serving.etp)
        products = products + grouped_matmul_seconds(
            hw, touched, rows / touched, outputs, inputs, dtype=dtype, weight_bytes=weight
        )
        products = products + transform_seconds(serving, linear, rows, serving.etp)
    scores = router_rows(model, moe)
    router = matmul_seconds(hw, tokens, scores, model.hidden_size, dtype=_plain(hw))
    # Softmax, choice inside groups, weights, casts; sorting, counting and cumulating the rows.
    choice = 10 * vector_seconds(hw, 4.0 * tokens * model.num_experts)
    element = _element(serving)
    permute = 3 * vector_seconds(hw, 2.0 * element * rows * model.hidden_size)
    width = model.moe_ffn_hidden_size / serving.etp
    activation = vector_seconds(hw, 3.0 * element * rows * width)
    return router + choice + permute + products + activation


def _measured_factor(serving: Serving, chosen: np.ndarray, tokens: Array) -> Array:
    """The straggler factor of experts that are as popular as measured, the mean over layers."""
    groups = serving.moe.equal_groups
    if groups > 1:  # every rank's load follows from its groups, or nearly so
        return straggler_factor(
            tokens, serving.model.num_experts, serving.moe.top_k, serving.ep, groups=groups
        )
    mean = chosen.mean(axis=0)
    return straggler_factor(
        tokens, len(mean), serving.moe.top_k, serving.ep, popularity=-np.log1p(-mean)
    )


def _small_operators(serving: Serving, tokens: Array, local: Array) -> Array:
    """Two norms with residuals, rotary embedding, cache write, and the casts of quantised
    activations; norms run on scattered tokens."""
    model, hw, n = serving.model, serving.hardware, serving.devices
    element = _element(serving)
    hidden = element * tokens * model.hidden_size / n
    norms = (4 if model.sandwich_norm else 2) * vector_seconds(hw, 4 * hidden)
    heads = (model.num_attention_heads + query_groups(model)) / serving.tp
    rotary = vector_seconds(hw, 2.0 * element * local * heads * qk_size(model))
    cache = vector_seconds(hw, 2.0 * local * cache_bytes_per_token(serving))
    quantised = ELEMENT_BYTES[serving.options.compute_dtype] < 2
    casts = 4 * vector_seconds(hw, 3.0 * local * model.hidden_size) if quantised else 0.0
    return norms + rotary + cache + casts


def _exchange(serving: Serving, tokens: Array, local: Array) -> Array:
    """The halves of two all-reduces: out of attention, into the MLP or experts, and back."""
    hw, n, tp = serving.hardware, serving.devices, serving.tp
    width = _element(serving) * serving.model.hidden_size
    inside = [("reduce_scatter", local * width, tp), ("all_gather", local * width, tp)]
    across = [("all_gather", tokens * width, n), ("reduce_scatter", tokens * width, n)]
    return total(
        collective_seconds(hw, kind, size, group)  # type: ignore[arg-type]
        for kind, size, group in inside + across
    )


def _cached_attention(serving: Serving, local: Array, new: Array, context: Array) -> Array:
    """Attention of a few new tokens over the cache: MLA multiplies the compressed cache itself
    (absorbed up-projections), shared by all heads, where the cache has latents."""
    model, options = serving.model, serving.options
    latents = keeps_latents(serving)
    rank = model.kv_lora_rank
    return attention_seconds(
        serving.hardware,
        batch=local,
        heads=model.num_attention_heads / serving.tp,
        kv_heads=0.5 if latents else kept_heads(serving),
        seq_q=new,
        seq_kv=context + new,
        qk_dim=rank + model.qk_pos_emb_head_dim if latents else qk_size(model),
        v_dim=rank if latents else v_size(model),
        causal=False,
        dtype=_attention_dtype(serving),
        kv_bytes=ELEMENT_BYTES[options.kv_dtype],
    )


def _attention_dtype(serving: Serving) -> str:
    return _plain(serving.hardware)


def _element(serving: Serving) -> float:
    """Bytes of a number of what is not quantised."""
    return ELEMENT_BYTES[_plain(serving.hardware)]


def _plain(hardware: Hardware) -> str:
    """The 16-bit dtype of the device; float32 where it has none."""
    return next((name for name in ("bf16", "fp16") if name in hardware.peak_tflops), "fp32")
