"""The papers' architecture search (arXiv 2505.21411, section on the choice of the configuration;
2505.04519): which shape of a model the hardware likes.

Three stages: every shape of the ranges counted at once and timed by memory traffic and launch
costs alone; a shortlist spread over the sizes; the full model with its own layout search.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from configs.schema import Config
from configs.violation import ConfigError, Violation
from simulator.candidates import divisors
from simulator.hardware import ELEMENT_BYTES, Hardware, load_hardware
from simulator.inference import forecast, largest_batch
from simulator.parameters import (
    count_parameters,
)
from simulator.quality import model_loss
from simulator.search import search
from simulator.serving import serving
from simulator.shape_space import DIMENSIONS, Ranges, dimensions_of, enumerate_shapes, shaped
from simulator.words import layout_words

Goal = Literal["inference", "training"]
OPERATORS_PER_LAYER = 30  # launches of a decoding layer, for the coarse filter
BINS = 8  # of active parameters, over which the shortlist is spread


@dataclass(frozen=True)
class Shape:
    """A shape of the shortlist in its best layout. `own` is the model as it was given."""

    dimensions: dict[str, int]
    parameters: float
    active: float
    tokens_per_second_per_device: float
    layout: str
    memory_gib: float
    batch: int = 0  # inference: sequences of one copy
    tpot_ms: float | None = None
    mfu: float | None = None
    own: bool = False
    loss: float | None = None  # of `simulator.quality`, where it is asked for


@dataclass(frozen=True)
class ShapeResult:
    """Shapes of the shortlist that work, fastest first, and the front of throughput against the
    expected loss, or active parameters where that is not asked for. `rejected` counts by reason."""

    shapes: list[Shape]
    pareto: list[Shape]
    candidates: int
    shortlisted: int
    rejected: dict[str, int]
    seconds: float
    own: Shape | None = field(default=None)


def _refuse_empty(config: Config, ranges: Ranges) -> None:
    empty = [name for name in DIMENSIONS if not getattr(ranges, name)]
    if empty:
        raise ConfigError([Violation(name, "", "has no value to try") for name in empty])
    if not config.model.num_experts:
        raise ConfigError([Violation("model", config.model.name, "has no experts to shape")])


def search_shapes(
    config: Config,
    ranges: Ranges,
    goal: Goal,
    *,
    shortlist: int = 48,
    tokens: float | None = None,
    pinned: frozenset[str] = frozenset(),
    progress: Callable[[int, int], None] | None = None,
) -> ShapeResult:
    """Rank the shapes of `ranges` for `config`'s machine and devices.

    Everything that `ranges` does not name stays as in `config`; the shared expert keeps its width
    relative to a routed one.

    Args:
        goal: decoding throughput within `inference.latency_limit_ms`, or training throughput.
        shortlist: how many shapes the full model sees.
        tokens: that a shape is trained on; those are left out whose expected loss
            (`simulator.quality`) is above that of `config`'s model. None: the loss is not asked.
        pinned: configuration keys that a layout search keeps.

    Raises:
        ConfigError: not a model with experts, ranges that are empty, or no shape within limits.
    """
    start = time.perf_counter()
    _refuse_empty(config, ranges)
    hardware = load_hardware(config.hardware)
    dimensions, total, active, rejected, candidates = enumerate_shapes(config, ranges, tokens)
    if not len(total):
        most = max(rejected, key=lambda reason: rejected[reason])
        reason = f"none is left, {rejected[most]:,} because {most}"
        raise ConfigError([Violation("shape", f"{candidates:,} shapes", reason)])
    if goal == "inference":
        rate = coarse_decoding(config, hardware, dimensions, total, active)
        if outside := int((rate <= 0).sum()):
            rejected["weights and one sequence exceed memory or the latency limit"] = outside
    else:
        rate = coarse_training(config, hardware, active)
    chosen = spread(rate, active, shortlist)
    judge = _served if goal == "inference" else _trained
    shapes: list[Shape] = []
    own = judge(config, dimensions_of(config), pinned, True)
    if own:
        own = _learning(own, config, tokens)
    for done, index in enumerate(chosen, start=1):
        picked = {name: int(values[index]) for name, values in dimensions.items()}
        shape = judge(shaped(config, picked), picked, pinned, False)
        if shape:
            shapes.append(_learning(shape, shaped(config, picked), tokens))
        if progress:
            progress(done, len(chosen))
    if failed := len(chosen) - len(shapes):
        rejected["no layout fits memory and latency"] = failed
    if not shapes:
        reason = f"none of {len(total):,} shapes within the limits fits memory and latency on them"
        raise ConfigError([Violation("devices", config.world_size, reason)])
    shapes.sort(key=lambda shape: -shape.tokens_per_second_per_device)
    seconds = time.perf_counter() - start
    return ShapeResult(shapes, front(shapes), candidates, len(chosen), rejected, seconds, own)


def _learning(shape: Shape, config: Config, tokens: float | None) -> Shape:
    return replace(shape, loss=model_loss(config, tokens)) if tokens else shape


def coarse_decoding(
    config: Config,
    hardware: Hardware,
    columns: dict[str, np.ndarray],
    total: np.ndarray,
    active: np.ndarray,
) -> np.ndarray:
    """Tokens/s/device of a server by its memory, bandwidth, peak and launches alone: step time
    is linear in the batch, which fills the memory or the latency limit. 0: nothing fits."""
    options, devices, model = config.inference, config.world_size, config.model
    bandwidth = devices * hardware.memory_bandwidth * hardware.memory_efficiency
    weights = total * ELEMENT_BYTES[options.weight_dtype]
    head = model.kv_channels or columns["hidden_size"] / columns["num_attention_heads"]
    width = 2 * columns["num_query_groups"] * head
    if model.attention == "mla":
        width = np.full(len(total), model.kv_lora_rank + model.qk_pos_emb_head_dim, dtype=float)
    cached = columns["num_layers"] * width * ELEMENT_BYTES[options.kv_dtype]
    length = options.prompt_length + options.max_new_tokens
    room = devices * 0.94 * hardware.memory_bytes - weights
    batch = np.maximum(room, 0.0) / (cached * length)
    launch = hardware.launch_us.matmul * 1e-6
    fixed = weights / bandwidth + OPERATORS_PER_LAYER * columns["num_layers"] * launch
    flops = 2 * active / (devices * hardware.peak(options.compute_dtype))
    each = cached * options.mean_context / bandwidth + flops
    if options.latency_limit_ms:
        batch = np.minimum(batch, (options.latency_limit_ms / 1e3 - fixed) / each)
    batch = np.where(batch >= 1, batch, 0.0)
    rate: np.ndarray = batch / (fixed + batch * each) / devices
    return rate


def coarse_training(config: Config, hardware: Hardware, active: np.ndarray) -> np.ndarray:
    """Tokens/s/device at the peak, by active parameters alone."""
    dtype = "fp16" if "bf16" not in hardware.peak_tflops else "bf16"
    return hardware.peak(dtype) / (6 * active)


def spread(rate: np.ndarray, active: np.ndarray, count: int) -> list[int]:
    """The fastest of each of `BINS` equal parts of the range of active parameters, `count` in
    all: throughput alone would choose the smallest models only."""
    possible = np.flatnonzero(rate > 0)
    if not len(possible):
        return []
    edges = np.linspace(active[possible].min(), active[possible].max(), BINS + 1)
    part = np.clip(np.searchsorted(edges, active[possible], side="right") - 1, 0, BINS - 1)
    ordered = np.lexsort((-rate[possible], part))
    position = np.empty(len(possible), dtype=int)
    starts = np.searchsorted(part[ordered], np.arange(BINS))
    position[ordered] = np.arange(len(possible)) - starts[part[ordered]]
    best = np.lexsort((-rate[possible], position))[:count]  # every part's first, then second, …
    return [int(index) for index in possible[best]]


def _served(
    config: Config, dimensions: dict[str, int], pinned: frozenset[str], own: bool
) -> Shape | None:
    """The fastest way to serve a shape: attention TP × DP, experts EP × ETP."""
    devices, best = config.world_size, None
    hardware = load_hardware(config.hardware)
    fixed = any(key.startswith("parallel") for key in pinned)
    now = config.parallel
    sizes = [
        (tp, ep, devices // ep)
        for tp in divisors(devices, config.model.num_attention_heads)
        for ep in divisors(devices, config.model.num_experts)
        if config.model.num_attention_heads % tp == 0 and config.model.num_experts % ep == 0
    ]
    if fixed:
        expert = (now.expert_model_parallel_size, now.expert_tensor_parallel_size)
        sizes = [(now.tensor_model_parallel_size, *expert)]
    for tp, ep, etp in sizes:
        parallel = replace(
            now,
            tensor_model_parallel_size=tp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
        )
        layout = serving(replace(config, parallel=parallel), hardware)
        batch = config.inference.batch_size or largest_batch(layout)[0]
        if not batch:
            continue
        result = forecast(layout, batch)
        limit = config.inference.latency_limit_ms
        if not result.fits or (limit and 1e3 * result.tpot_seconds > limit):
            continue
        if best and result.tokens_per_second_per_device <= best[0].tokens_per_second_per_device:
            continue
        words = f"attention TP{tp} DP{devices // tp}, experts EP{layout.ep} TP{layout.etp}"
        best = result, words
    if best is None:
        return None
    result, words = best
    count = count_parameters(config)
    return Shape(
        dimensions=dimensions,
        parameters=count.total,
        active=count.active,
        tokens_per_second_per_device=result.tokens_per_second_per_device,
        layout=words,
        memory_gib=result.memory_gib,
        batch=result.batch,
        tpot_ms=1e3 * result.tpot_seconds,
        own=own,
    )


def _trained(
    config: Config, dimensions: dict[str, int], pinned: frozenset[str], own: bool
) -> Shape | None:
    """The fastest layout to train a shape."""
    result = search(config, pinned=pinned, top=1)
    if not result.choices:
        return None
    choice = result.choices[0]
    count = count_parameters(config)
    return Shape(
        dimensions=dimensions,
        parameters=count.total,
        active=count.active,
        tokens_per_second_per_device=choice.prediction.tokens_per_second_per_device,
        layout=layout_words(choice.config),
        memory_gib=choice.prediction.peak_memory_gib,
        mfu=choice.prediction.mfu,
        own=own,
    )


def front(shapes: list[Shape]) -> list[Shape]:
    """Of shapes with the fastest first, those of which no faster one learns more: has a lower
    loss, or more active parameters where the loss is not known."""
    result: list[Shape] = []
    for shape in shapes:
        if not result or _learns(shape) > _learns(result[-1]):
            result.append(shape)
    return result


def _learns(shape: Shape) -> float:
    return shape.active if shape.loss is None else -shape.loss
