"""What this rank does when: its collectives from their start to their end, and what it computes
meanwhile. For the steps that somebody wants a trace of; else nothing is noted.

On a CPU one thread computes, unless it is inside a collective or waits for one. So computing is
what is left of a step without those; a collective that was started asynchronously goes on beside it
in threads of its library.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

COMPUTE, INSIDE, BETWEEN, SWAP = (
    "compute",
    "communication inside the node",
    "communication between nodes",
    "swap",
)
LANES = (COMPUTE, INSIDE, BETWEEN, SWAP)
# Nanoseconds of the clock that counts a process' time until it agrees with the other nodes'.
_EPOCH = time.time_ns() - time.perf_counter_ns()


@dataclass
class Span:
    """From `start` to `end`, in nanoseconds since 1970; `end` is 0 while it goes on."""

    lane: str
    name: str
    start: int
    end: int = 0
    group: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def finish(self) -> None:
        """It ends now, unless it has ended."""
        self.end = self.end or _now()


_UNSEEN = Span("", "", 0)  # every collective's of steps that nobody records


class Timeline:
    """The spans of the steps that were recorded, in the order of their starts."""

    def __init__(self) -> None:
        self.recording = False
        self.ranks_per_node = 1
        self.spans: list[Span] = []
        self._free_since = 0

    @contextlib.contextmanager
    def step(self, ranks_per_node: int) -> Iterator[None]:
        """Record what happens inside; what is under way at its end is recorded whole."""
        self.ranks_per_node, self.recording = ranks_per_node, True
        self._free_since = _now()
        yield
        self._computed(_now())
        self.recording = False

    def collective(self, name: str, group: str, ranks: Sequence[int], number: int) -> Span:
        """One that starts now; `ranks` of the run, which fill one node after the other."""
        if not self.recording:
            return _UNSEEN
        nodes = {rank // self.ranks_per_node for rank in ranks}
        span = Span(INSIDE if len(nodes) == 1 else BETWEEN, name, _now(), group=group)
        span.details = {"group": group, "ranks": list(ranks), "number": number}
        self.spans.append(span)
        return span

    def waited(self, span: Span) -> None:
        """It was waited for from its start until now."""
        self._computed(span.start)
        span.finish()
        self.resume()

    @contextlib.contextmanager
    def swapping(self, name: str) -> Iterator[None]:
        """A transfer to the host or back, by a thread of its own."""
        if not self.recording:
            yield
            return
        span = Span(SWAP, name, _now())
        self.spans.append(span)
        yield
        span.finish()

    def watch(self, work: Any, span: Span) -> Any:
        """The work of an asynchronous call, whose end and whose waits are noted."""
        with contextlib.suppress(RuntimeError):  # a send's or a receive's has no future
            work.get_future().add_done_callback(lambda _: span.finish())
        return _Watched(work, span)

    def pause(self) -> None:
        """Computing ends here."""
        self._computed(_now())

    def resume(self) -> None:
        """Computing begins here."""
        self._free_since = _now()

    def _computed(self, until: int) -> None:
        if self.recording:
            # Of the part before: a collective that ends it belongs to the same pass.
            backward = torch._C._current_graph_task_id() != -1
            name = "backward" if backward else "forward, optimizer"
            self.spans.append(Span(COMPUTE, name, self._free_since, until))


class _Watched:
    """A work, in its place."""

    def __init__(self, work: Any, span: Span) -> None:
        self._work, self._span = work, span

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any) -> Any:
        timeline.pause()
        done = self._work.wait(*args)
        self._span.finish()
        timeline.resume()
        return done


def _now() -> int:
    return time.perf_counter_ns() + _EPOCH


timeline = Timeline()
