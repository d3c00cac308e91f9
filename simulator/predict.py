"""The forecast of one configuration: step time from an event-by-event schedule, memory by stage,
and where every second and byte comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config
from configs.violation import ConfigError, Violation
from simulator.layout import StageContent, from_config
from simulator.memory import (
    Memory,
    fits,
    measured_peak,
    rank_memory,
    stage_contents,
    stage_parameters,
)
from simulator.parameters import LayerKind, model_flops_per_token
from simulator.parts import Parts, peak_dtype, prepare, tokens_per_step
from simulator.passes import layer_waits, rank_seconds, send_seconds
from simulator.pipeline import RankSeconds, hidden_seconds
from simulator.seconds import EXPERT_GROUPS, BlockSeconds, Line
from simulator.step_end import DataParallel, data_parallel
from simulator.timeline import Timeline, UnitSeconds, build

ACCURACY = Path(__file__).parent / "accuracy.json"  # written by `validate`
GIB = 2**30


@dataclass(frozen=True)
class Stage:
    """One pipeline rank: its content, seconds per micro-batch and memory."""

    rank: int
    layers: int
    forward_seconds: float
    backward_seconds: float
    idle_seconds: float  # of a step, waiting for other ranks
    parameters: int
    memory: Memory


@dataclass(frozen=True)
class BillLine:
    """An operator or message of one building block: seconds per micro-batch, of which `exposed`
    are not hidden behind another operator."""

    block: str
    count: int  # blocks of this kind on the slowest rank
    line: Line


@dataclass(frozen=True)
class ErrorBar:
    """Relative error of the validation rows nearest to a forecast."""

    low: float
    high: float
    rows: int
    source: str


@dataclass(frozen=True)
class ExpertMessages:
    """Seconds of a step that tokens are under way to experts and back on the slowest rank, what is
    sent again left out, and those in which it computes for the same layer, or for another
    micro-batch."""

    seconds: float
    beside_layer: float
    beside_micro_batch: float


@dataclass(frozen=True)
class Forecast:
    """Forecast of one training step. Seconds, GiB, bytes as named; see `breakdown` for where the
    step's seconds go on its slowest rank."""

    step_seconds: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    mfu: float
    peak_tflops: float  # that `mfu` is relative to
    peak_dtype: str
    model_flops_per_token: float
    peak_memory_gib: float
    memory_gib: float  # of the device
    fits: bool
    devices: int
    num_microbatches: int
    bubble_fraction: float
    breakdown: dict[str, float]
    expert_messages: ExpertMessages
    stages: list[Stage]
    bill: list[BillLine]
    timeline: Timeline
    expert_load: float
    energy_kilojoules: float | None
    cost_per_million_tokens: float | None
    error: ErrorBar | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, with memory by stage and category in GiB."""
        plain = (
            "step_seconds tokens_per_second tokens_per_second_per_device mfu peak_tflops peak_dtype"
            " model_flops_per_token peak_memory_gib memory_gib fits devices num_microbatches"
            " bubble_fraction breakdown expert_load energy_kilojoules cost_per_million_tokens"
        )
        result: dict[str, Any] = {name: getattr(self, name) for name in plain.split()}
        result["expert_messages"] = vars(self.expert_messages)
        result["error"] = vars(self.error) if self.error else None
        result["stages"] = [
            {
                **{key: value for key, value in vars(stage).items() if key != "memory"},
                "memory_gib": {
                    **{key: float(value) / GIB for key, value in vars(stage.memory).items()},
                    "peak": float(stage.memory.peak) / GIB,
                },
            }
            for stage in self.stages
        ]
        return result


def predict(config: Config, load: float | None = None) -> Forecast:
    """Forecast `config`.

    `load` overrides the expected imbalance of expert-parallel ranks.

    Raises:
        ConfigError: sizes that do not divide, no machine, or a machine that lacks the precision.
    """
    layout = from_config(config)
    if not layout.dp or not layout.num_microbatches:
        raise ConfigError([_does_not_divide(config)])
    parts = prepare(config, layout, load)
    ranks = range(int(layout.pp))
    held = _ranks(parts)
    timeline = build(layout, [rank.units for rank in held], float(send_seconds(parts)))
    reduced = [
        finish + float(rank.end.reduce)
        for finish, rank in zip(timeline.finished, held, strict=True)
    ]
    optimizer = max(float(rank.end.optimizer) for rank in held)
    gather = max(float(rank.end.gather) for rank in held)
    step = max(reduced) + optimizer + gather
    slowest = max(ranks, key=lambda rank: float(held[rank].seconds.both))
    stages = [_stage(parts, rank, held[rank], timeline) for rank in ranks]
    peak = max(float(measured_peak(parts.hardware, stage.memory)) for stage in stages)
    outside = max(float(stage.memory.buffers) for stage in stages)
    tokens = float(tokens_per_step(config, layout))
    devices = int(layout.devices)
    dtype = peak_dtype(parts)
    flops = model_flops_per_token(config)
    breakdown = _breakdown(
        parts, slowest, held[slowest], step=step, optimizer=optimizer, gather=gather
    )
    return Forecast(
        step_seconds=step,
        tokens_per_second=tokens / step,
        tokens_per_second_per_device=tokens / step / devices,
        mfu=tokens / step / devices * flops / parts.hardware.peak(dtype),
        peak_tflops=parts.hardware.peak(dtype) / 1e12,
        peak_dtype=dtype,
        model_flops_per_token=flops,
        peak_memory_gib=peak / GIB,
        memory_gib=parts.hardware.memory_gib,
        fits=bool(fits(parts.hardware, peak, outside)),
        devices=devices,
        num_microbatches=int(layout.num_microbatches),
        bubble_fraction=breakdown.get(BUBBLE, 0.0) / step,
        breakdown=breakdown,
        expert_messages=_expert_messages(parts, slowest, held[slowest]),
        stages=stages,
        bill=_bill(parts, held[slowest].contents),
        timeline=timeline,
        expert_load=float(parts.load),
        energy_kilojoules=_scaled(parts.hardware.power_w, step * devices / 1e3),
        cost_per_million_tokens=_scaled(
            parts.hardware.price_per_hour, step * devices / 3600 / tokens * 1e6
        ),
        error=error_bar(parts.hardware.name, bool(config.model.num_experts)),
    )


def _does_not_divide(config: Config) -> Violation:
    if not config.data_parallel_size:
        reason = "is no multiple of tensor x pipeline x context parallel sizes"
        return Violation("devices", config.world_size, reason)
    size = config.train.micro_batch_size * config.data_parallel_size
    reason = f"is no multiple of micro-batch x data-parallel size = {size}"
    return Violation("train.global_batch_size", config.train.global_batch_size, reason)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


@dataclass(frozen=True)
class _Rank:
    """A pipeline rank's content and what it costs; ranks that hold the same share it."""

    contents: list[StageContent]
    units: list[UnitSeconds]  # by chunk
    seconds: RankSeconds
    parameters: float
    end: DataParallel


def _ranks(parts: Parts) -> list[_Rank]:
    """Every pipeline rank, each distinct content priced once."""
    known: dict[tuple[float, ...], _Rank] = {}
    ranks = []
    for index in range(int(parts.layout.pp)):
        contents = stage_contents(parts.shapes, index, int(parts.layout.vpp))
        key = tuple(float(item) for content in contents for item in vars(content).values())
        if key not in known:
            known[key] = _rank(parts, contents)
        ranks.append(known[key])
    return ranks


def _rank(parts: Parts, contents: list[StageContent]) -> _Rank:
    seconds = rank_seconds(parts, contents)
    parameters = stage_parameters(parts.shapes, contents)
    units = []
    for chunk in contents:
        unit = rank_seconds(parts, [chunk])
        passes = (unit.forward, unit.input_gradient, unit.weight_gradient, unit.hideable)
        units.append(UnitSeconds(*(float(value) for value in passes)))
    end = data_parallel(parts, parameters, seconds)
    return _Rank(contents, units, seconds, float(parameters.total), end)


def _stage(parts: Parts, rank: int, held: _Rank, timeline: Timeline) -> Stage:
    seconds = held.seconds
    busy = float(seconds.both) * int(parts.layout.num_microbatches)
    busy -= float(hidden_seconds(parts.layout, rank, seconds))
    return Stage(
        rank=rank,
        layers=int(sum(float(content.layers) for content in held.contents)),
        forward_seconds=float(seconds.forward),
        backward_seconds=float(seconds.backward),
        idle_seconds=max(timeline.seconds - busy, 0.0),
        parameters=int(held.parameters),
        memory=rank_memory(parts.shapes, parts.blocks, parts.kept, rank, held.contents),
    )


def _blocks(parts: Parts, contents: list[StageContent]) -> list[tuple[str, float, BlockSeconds]]:
    """The kinds of building block on a rank, how many of each, and their seconds."""
    return [
        (
            name,
            sum(float(getattr(content, name)) for content in contents),
            getattr(parts.seconds, name),
        )
        for name in ("embedding", "patch", "dense", "moe", "mtp", "head")
    ]


def _bill(parts: Parts, contents: list[StageContent]) -> list[BillLine]:
    return [
        BillLine(name, int(count), line)
        for name, count, block in _blocks(parts, contents)
        if count
        for line in block.lines
        if float(line.seconds) > 0
    ]


def _expert_messages(parts: Parts, rank: int, held: _Rank) -> ExpertMessages:
    seconds = inside = 0.0
    for _, count, block in _blocks(parts, held.contents):
        lines = [line for line in block.lines if line.group in EXPERT_GROUPS]
        seconds += count * sum(float(line.seconds) for line in lines)
        inside += count * float(block.experts_hidden)
    beside = float(hidden_seconds(parts.layout, rank, held.seconds))
    times = int(parts.layout.num_microbatches)
    return ExpertMessages(seconds * times, inside * times, beside)


BUBBLE = "pipeline bubble and sends"
OPERATOR_LINES = {
    "matmul": "matrix products",
    "grouped_matmul": "expert matrix products",
    "attention": "attention",
    "vector": "vector operators",
}
GROUP_LINES = {
    "tp": "tensor-parallel communication",
    "cp": "context-parallel communication",
    **dict.fromkeys(EXPERT_GROUPS, "expert dispatch and combine"),
}


def _breakdown(
    parts: Parts,
    rank: int,
    held: _Rank,
    *,
    step: float,
    optimizer: float,
    gather: float,
) -> dict[str, float]:
    """Seconds of a step by what the slowest rank spends them on; they add up to the step."""
    layout = parts.layout
    count_of = int(layout.num_microbatches)
    result: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        result[name] = result.get(name, 0.0) + value * count_of

    for _, count, block in _blocks(parts, held.contents):
        if not count:
            continue
        for line in block.lines:
            key = GROUP_LINES[line.group] if line.group else OPERATOR_LINES[line.kind]
            add(key, count * float(line.exposed))
    kinds: tuple[LayerKind, ...] = ("dense", "moe")
    for kind in kinds:
        layers = sum(float(getattr(content, kind)) for content in held.contents)
        if layers:
            add("sharded weights and swapping", layers * float(sum(layer_waits(parts, kind))))
    add("waiting for the host", float(held.seconds.waiting))
    known = sum(result.values())
    result["recomputation"] = float(held.seconds.both) * count_of - known
    result["gradient reduction"] = float(held.end.reduce)
    result["optimizer"] = optimizer
    result["parameter gathering"] = gather
    experts = GROUP_LINES["ep"]
    hidden = float(hidden_seconds(layout, rank, held.seconds))
    result[experts] = result.get(experts, 0.0) - hidden
    result[BUBBLE] = step - sum(result.values())
    return {key: value for key, value in result.items() if abs(value) > 1e-9 * step}


def error_bar(hardware: str, experts: bool) -> ErrorBar | None:
    """The error of published runs nearest to a forecast: on the same machine and of the same
    kind of model, else on the same machine, else all. None before `validate` has run."""
    if not ACCURACY.is_file():
        return None
    entries = json.loads(ACCURACY.read_text())
    kind = "moe" if experts else "dense"
    for wanted, source in (
        (lambda e: e["hardware"] == hardware and e["kind"] == kind, f"{hardware}, {kind}"),
        (lambda e: e["hardware"] == hardware, hardware),
        (lambda e: True, "all machines"),
    ):
        chosen = [entry for entry in entries if wanted(entry)]
        if chosen:
            rows = sum(entry["rows"] for entry in chosen)
            spread = sum(entry["mean_error"] * entry["rows"] for entry in chosen) / rows
            bias = sum(entry["bias"] * entry["rows"] for entry in chosen) / rows
            return ErrorBar(-spread - bias, spread - bias, rows, source)
    return None
