"""A trace of some steps of all ranks (`profile.steps`), and how much communication they hide.

The trace is Chrome's format, which https://ui.perfetto.dev opens: a process per rank, a track per
lane of `pangu.backends.timeline`, a slice per collective and per stretch of computing.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from configs.layout import ranks_per_node
from configs.schema import Config
from pangu.backends.timeline import COMPUTE, LANES, SWAP, Span, timeline
from pangu.backends.turns import is_of_experts
from pangu.engines.ranks import say
from pangu.report.run_files import replace_text

TRACE = "trace.json"


@dataclass(frozen=True)
class Hidden:
    """Of a kind of communication, or of swap: seconds that it lasts and seconds of those in which
    its rank computes, mean over ranks."""

    lasting: float
    hidden: float

    def __str__(self) -> str:
        share = self.hidden / self.lasting if self.lasting else 0.0
        return f"{self.lasting:.3f} s, {share:.0%} hidden"


class Profile:
    """Records the steps of `profile.steps` as they come, and writes the trace after the last."""

    def __init__(self, config: Config) -> None:
        self._steps = set(config.profile.steps)
        self._ranks_per_node = ranks_per_node(config) or config.world_size
        self._path = Path(config.run_dir) / TRACE
        self._recorded: list[int] = []

    @contextlib.contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Around a step. Collective after the last one of `profile.steps`."""
        if step not in self._steps:
            yield
            return
        with timeline.step(self._ranks_per_node):
            yield
        self._recorded.append(step)
        if step == max(self._steps):
            self._finish()

    def _finish(self) -> None:
        spans, timeline.spans = timeline.spans, []
        first = dist.get_rank() == 0
        everyone: list[list[Span]] | None = [[]] * dist.get_world_size() if first else None
        dist.gather_object(spans, everyone)
        if everyone is None:
            return
        steps = ", ".join(map(str, self._recorded))
        try:
            replace_text(self._path, json.dumps(trace(everyone)))
            say(f"trace of steps {steps}: {self._path} (opens in https://ui.perfetto.dev)")
        except OSError as error:  # a run does not end for its trace
            say(f"warning: no trace of steps {steps}: {self._path}: {error.strerror}")
        for name, one in hidden(everyone).items():
            say(f"{name}: {one} behind computing of the same rank")


def hidden(ranks: Sequence[Sequence[Span]]) -> dict[str, Hidden]:
    """Of all communication, of that between nodes and inside, of experts' and of swap, what is
    hidden. Time in which two collectives of a rank are under way counts once."""
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for spans in ranks:
        computing = _joined([span for span in spans if span.lane == COMPUTE])
        talk = [span for span in spans if span.lane not in (COMPUTE, SWAP)]
        parts = {
            "communication": talk,
            **{lane: [span for span in talk if span.lane == lane] for lane in LANES[1:3]},
            "communication of experts": [span for span in talk if is_of_experts(span.group)],
            SWAP: [span for span in spans if span.lane == SWAP],
        }
        for name, chosen in parts.items():
            joined = _joined(chosen)
            lasting = sum(end - start for start, end in joined)
            kinds[name].append((lasting / 1e9, _common(joined, computing) / 1e9))
    return {
        name: Hidden(*(sum(column) / len(ranks) for column in zip(*rows, strict=True)))
        for name, rows in kinds.items()
        if any(lasting for lasting, _ in rows)
    }


def trace(ranks: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """Chrome's trace events; times in microseconds from the first span."""
    zero = min((span.start for spans in ranks for span in spans), default=0)
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(ranks):
        events.append(_name("process_name", rank, 0, f"rank {rank}"))
        for number, lane in enumerate(LANES):
            events.append(_name("thread_name", rank, number, lane))
            events.append(_name("thread_sort_index", rank, number, number))
        for span in spans:
            # What a step has begun and nobody has waited for is of no length here.
            end = span.end or span.start
            times = {"ts": (span.start - zero) / 1000, "dur": (end - span.start) / 1000}
            place = {"pid": rank, "tid": LANES.index(span.lane)}
            events.append({"ph": "X", "name": span.name, **place, **times, "args": span.details})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(kind: str, rank: int, lane: int, value: str | int) -> dict[str, Any]:
    key = "name" if isinstance(value, str) else "sort_index"
    return {"ph": "M", "name": kind, "pid": rank, "tid": lane, "args": {key: value}}


def _joined(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Intervals without overlaps, in order."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted((span.start, span.end) for span in spans if span.end > span.start):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _common(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> int:
    """Length of what two lists of intervals without overlaps share."""
    length = first = second = 0
    while first < len(one) and second < len(other):
        start = max(one[first][0], other[second][0])
        end = min(one[first][1], other[second][1])
        length += max(0, end - start)
        if one[first][1] < other[second][1]:
            first += 1
        else:
            second += 1
    return length
