"""Copies on a stream beside the main one are late here, as a device's may be: they are done when
somebody waits for an event behind them, not when they are asked for. Who reads what has not been
waited for, or gives memory away too early, shows in the numbers."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch

Copy = Callable[[], Any]


class LateCopies:
    """Of all streams of this process."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Copy]] = defaultdict(deque)
        self._done: dict[int, int] = defaultdict(int)

    def is_beside(self) -> bool:
        """Whether the current stream is another than the main one."""
        npu: Any = getattr(torch, "npu")  # noqa: B009 - torch-npu adds it
        return bool(npu.current_stream() != npu.default_stream())

    def put_off(self, copy: Copy) -> None:
        """Until its time comes on the current stream."""
        npu: Any = getattr(torch, "npu")  # noqa: B009
        self._waiting[npu.current_stream().npu_stream].append(copy)

    def asked(self, stream: int) -> int:
        """Copies that the stream has been asked for until now."""
        return self._done[stream] + len(self._waiting[stream])

    def is_late(self, stream: int, asked: int) -> bool:
        """Whether one of those that it had been asked for by then is not done."""
        return self._done[stream] < asked

    def catch_up(self, stream: int, asked: int) -> None:
        """Do those that it had been asked for by then."""
        while self.is_late(stream, asked):
            self._waiting[stream].popleft()()
            self._done[stream] += 1


LATE = LateCopies()
NOTHING = (0, 0)  # is what an event stands behind that was not recorded


def watch_events() -> None:
    """Let torch-npu's events know of copies that are late: none is over until somebody waits."""
    npu: Any = getattr(torch, "npu")  # noqa: B009
    record, wait, synchronize = npu.Event.record, npu.Event.wait, npu.Event.synchronize
    query = npu.Event.query

    def recorded(event: Any, stream: Any = None) -> None:
        stream = stream or npu.current_stream()
        event.behind = stream.npu_stream, LATE.asked(stream.npu_stream)
        record(event, stream)

    def waited(event: Any, stream: Any = None) -> None:
        LATE.catch_up(*getattr(event, "behind", NOTHING))
        wait(event, stream)

    def synchronized(event: Any) -> None:
        LATE.catch_up(*getattr(event, "behind", NOTHING))
        synchronize(event)

    def queried(event: Any) -> bool:
        return not LATE.is_late(*getattr(event, "behind", NOTHING)) and query(event)

    npu.Event.record, npu.Event.wait = recorded, waited
    npu.Event.synchronize, npu.Event.query = synchronized, queried
