"""The papers' architecture search (arXiv 2505.21411, section on the choice of the configuration;
2505.04519): which shape of a model the hardware likes.

Three stages: every shape of the ranges counted at once and timed by memory traffic and launch
costs alone; a shortlist spread over the sizes; the full model with its own layout search.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from configs.schema import Config, ModelConfig
from configs.violation import ConfigError, Violation
from simulator.array import Array
from simulator.candidates import divisors
from simulator.hardware import ELEMENT_BYTES, Hardware, load_hardware
from simulator.inference import forecast, largest_batch
from simulator.parameters import (
    attention_linears,
    count_parameters,
    layer_norms,
    mlp_linears,
    query_groups,
)
from simulator.quality import expected_loss, model_loss, used
from simulator.search import search
from simulator.serving import serving
from simulator.words import layout_words

Goal = Literal["inference", "training"]
OPERATORS_PER_LAYER = 30  # launches of a decoding layer, for the coarse filter
BINS = 8  # of active parameters, over which the shortlist is spread
MOST_SHAPES = 20_000_000


@dataclass(frozen=True)
class Ranges:
    """Values to try of each dimension, and limits in parameters (total and active). KV heads are
    meant for GQA: MLA has none."""

    num_layers: list[int]
    hidden_size: list[int]
    num_attention_heads: list[int]
    num_query_groups: list[int]
    num_experts: list[int]
    num_expert_groups: list[int]
    moe_ffn_hidden_size: list[int]
    parameters: tuple[float, float] = (0.0, np.inf)
    active: tuple[float, float] = (0.0, np.inf)


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
    empty = [name for name in _NAMES if not getattr(ranges, name)]
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
    own = judge(config, _dimensions(config), pinned, True)
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


def enumerate_shapes(
    config: Config, ranges: Ranges, tokens: float | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, dict[str, int], int]:
    """All shapes within limits, as arrays by dimension, with total and active parameters; then
    how many others there are by reason, and how many in all."""
    axes = {name: getattr(ranges, name) for name in _NAMES}
    candidates = int(np.prod([float(len(values)) for values in axes.values()]))
    if candidates > MOST_SHAPES:
        reason = f"at most {MOST_SHAPES:,} at a time: take larger steps"
        raise ConfigError([Violation("shape", f"{candidates:,} shapes", reason)])
    grid = np.meshgrid(*(np.array(values) for values in axes.values()), indexing="ij")
    columns = {name: part.ravel() for name, part in zip(axes, grid, strict=True)}
    groups, top_k = columns["num_expert_groups"], config.moe.top_k
    total, active = parameters_of(config, columns)
    alive = np.ones(candidates, dtype=bool)
    rejected: dict[str, int] = {}
    for reason, bad in (
        ("query heads are no multiple of KV heads", _remainder(config.model, columns)),
        ("experts do not split over the groups", columns["num_experts"] % groups != 0),
        ("the chosen experts do not split over the groups", top_k % groups != 0),
        ("fewer experts than a token chooses", columns["num_experts"] < top_k),
        ("parameters outside the limits", _outside(total, ranges.parameters)),
        ("active parameters outside the limits", _outside(active, ranges.active)),
        ("a higher loss expected than the model's own", _worse(config, columns, active, tokens)),
    ):
        count = int((alive & bad).sum())
        if count:
            rejected[reason] = count
        alive &= ~bad
    kept = {name: values[alive] for name, values in columns.items()}
    return kept, total[alive], active[alive], rejected, candidates


_NAMES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_experts",
    "num_expert_groups",
    "moe_ffn_hidden_size",
)


def _remainder(model: ModelConfig, columns: dict[str, np.ndarray]) -> np.ndarray:
    if model.attention == "mla":  # has no KV heads of its own
        return np.zeros(len(columns["num_layers"]), dtype=bool)
    bad: np.ndarray = columns["num_attention_heads"] % columns["num_query_groups"] != 0
    return bad


def _worse(
    config: Config, columns: dict[str, np.ndarray], active: np.ndarray, tokens: float | None
) -> np.ndarray:
    if not tokens:
        return np.zeros(len(active), dtype=bool)
    width = columns["moe_ffn_hidden_size"]
    shared = np.round(_shared_ratio(config.model) * width)
    expansion, granularity = used(config, columns["num_experts"], width, shared)
    loss = expected_loss(active, expansion, granularity, tokens)
    return np.asarray(loss > model_loss(config, tokens) * (1 + 1e-9))


def _outside(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (values < limits[0]) | (values > limits[1])


def _shared_ratio(model: ModelConfig) -> float:
    return model.shared_expert_ffn_hidden_size / model.moe_ffn_hidden_size


def parameters_of(config: Config, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Total and active parameters of shapes given as arrays; `count_parameters` for each."""
    base = config.model
    shape = {name: columns[name] for name in _NAMES if name != "num_expert_groups"}
    # Widths of 0 mean "none" elsewhere, which an array cannot be asked; added below.
    model: Any = replace(base, **shape, shared_expert_ffn_hidden_size=0)  # type: ignore[arg-type]
    total = np.zeros(len(columns["num_layers"]))
    hidden = model.hidden_size.astype(float)
    for groups in np.unique(columns["num_query_groups"]):
        rows = columns["num_query_groups"] == groups
        one = replace(model, num_query_groups=int(groups))
        linears = sum(linear.parameters() for linear in attention_linears(one))
        total[rows] = np.broadcast_to(linears, total.shape)[rows]
    layer = total + layer_norms(model)
    width = np.round(_shared_ratio(base) * model.moe_ffn_hidden_size)
    shared = sum(linear.parameters() for linear in mlp_linears(model, width))
    expert: Array = sum(
        linear.parameters() for linear in mlp_linears(model, model.moe_ffn_hidden_size)
    )
    router = model.num_experts * hidden + (model.num_experts if config.moe.router_scale else 0)
    dense: Array = sum(linear.parameters() for linear in mlp_linears(model, base.ffn_hidden_size))
    dense_layers = base.num_dense_layers
    moe_layers = model.num_layers - dense_layers
    tables = base.vocab_size * hidden * (1 if base.tie_embeddings else 2)
    ends = tables + hidden * (2 if base.normalization == "LayerNorm" else 1)
    same = ends + model.num_layers * layer + dense_layers * dense + moe_layers * (router + shared)
    routed = moe_layers * expert
    return same + routed * model.num_experts, same + routed * config.moe.top_k


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
    each = cached * (options.prompt_length + options.max_new_tokens / 2) / bandwidth + flops
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


def shaped(config: Config, dimensions: dict[str, int]) -> Config:
    """`config` with another shape."""
    shape = {name: value for name, value in dimensions.items() if name != "num_expert_groups"}
    shared = round(_shared_ratio(config.model) * dimensions["moe_ffn_hidden_size"])
    if config.model.attention == "mla":
        shape["num_query_groups"] = config.model.num_query_groups
    model = replace(config.model, **shape, shared_expert_ffn_hidden_size=shared)  # type: ignore[arg-type]
    moe = replace(config.moe, num_expert_groups=dimensions["num_expert_groups"])
    return replace(config, model=model, moe=moe)


def _dimensions(config: Config) -> dict[str, int]:
    model = config.model
    values = {name: getattr(model, name) for name in _NAMES if name != "num_expert_groups"}
    values["num_query_groups"] = query_groups(model)
    return values | {"num_expert_groups": config.moe.num_expert_groups}


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
