"""A forecast as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

from typing import Any

from simulator.predict import Forecast

NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "FB": "forward beside backward",
}
LAYER_TRACK = 1_000_000  # process id of the tracks that show one block's operators


def chrome_trace(prediction: Forecast) -> dict[str, Any]:
    """One process per pipeline rank, and one per building block with its operators in the order
    of issue. Times in µs."""
    events = [
        _label(stage.rank, f"pipeline rank {stage.rank}: {stage.layers} layers")
        for stage in prediction.stages
    ]
    events += [
        {
            "name": f"{NAMES[event.kind]} {event.micro_batch}",
            "cat": event.kind,
            "ph": "X",
            "pid": event.rank,
            "tid": event.chunk,
            "ts": event.start * 1e6,
            "dur": (event.end - event.start) * 1e6,
            "args": {"micro_batch": event.micro_batch, "chunk": event.chunk},
        }
        for event in prediction.timeline.events
    ]
    end = prediction.timeline.seconds
    for name in ("gradient reduction", "optimizer", "parameter gathering"):
        seconds = prediction.breakdown.get(name, 0.0)
        if seconds:
            events += [_span(name, stage.rank, 0, end, seconds) for stage in prediction.stages]
        end += seconds
    for index, block in enumerate(dict.fromkeys(entry.block for entry in prediction.bill)):
        process = LAYER_TRACK + index
        events.append(_label(process, f"one {block} block, one micro-batch"))
        clock = 0.0
        lines = [entry.line for entry in prediction.bill if entry.block == block]
        for phase in ("forward", "input_gradient", "weight_gradient"):
            for line in lines:
                if line.phase != phase:
                    continue
                track = 1 if line.group else 0
                events.append(_span(line.name, process, track, clock, float(line.seconds)))
                clock += float(line.exposed)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _span(name: str, process: int, track: int, start: float, seconds: float) -> dict[str, Any]:
    span = {"name": name, "ph": "X", "pid": process, "tid": track}
    return span | {"ts": start * 1e6, "dur": seconds * 1e6}


def _label(process: int, name: str) -> dict[str, Any]:
    return {"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}}
