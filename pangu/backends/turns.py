"""Two passes side by side in one process, of which one at a time computes.

Each has a thread. Where one begins to wait for tokens on their way to experts or back, it hands the
other the turn, and has it again where the other begins to wait, or ends. They alternate strictly,
whatever arrives first: ranks that run the same two passes call their collectives in the same order,
which is all that keeps them from waiting for each other for ever.

Other collectives keep the turn. Those of tensor parallelism write into buffers that the engine has
once, for one pass. Counts go forward alone; what has a gradient goes both ways, in the opposite
order: tokens, results forward; results, tokens backward. So passes that change turns for these keep
step: one's tokens travel while the other's experts compute, its results beside the other's
attention.

On a device both passes' work is queued on one stream, in the order of turns, and messages go on
streams of their library: a pass whose turn has come back lets the stream wait for its message,
behind all that the other has queued meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

from pangu.backends.timeline import timeline

T = TypeVar("T")
U = TypeVar("U")


class _Pass:
    """One of the two; `other` is set before either runs."""

    other: _Pass

    def __init__(self) -> None:
        self.turn = threading.Semaphore(0)
        self.over = self.failed = False

    def run(self, work: Callable[[], T]) -> T:
        """`work`, in the turn that this thread has; the other has it afterwards."""
        timeline.resume()
        _thread.own = self
        try:
            return work()
        except BaseException:
            self.failed = True
            raise
        finally:
            _thread.own, self.over = None, True
            timeline.pause()
            self.other.turn.release()


class _Thread(threading.local):
    own: _Pass | None = None  # that this thread runs


_thread = _Thread()


class AbandonedError(RuntimeError):
    """The other pass has failed: this one ends too."""


def is_of_experts(group: str) -> bool:
    """Whether a group's messages are tokens on their way to experts or back, by its name."""
    return group.startswith("EXPERT") and "DATA" not in group


def hand_over() -> None:
    """Let the other pass compute until it waits or ends; at once where there is none.

    Raises:
        AbandonedError: the other pass has failed.
    """
    own = _thread.own
    if own is None:
        return
    if not own.other.over:
        timeline.pause()
        own.other.turn.release()
        own.turn.acquire()
        timeline.resume()
    if own.other.failed:
        raise AbandonedError("the pass beside this one has failed")


def side_by_side(first: Callable[[], T], second: Callable[[], U]) -> tuple[T, U]:
    """Both results. `first` begins, in this thread; `second` is a forward pass with gradients, or
    anything else that needs no state of the calling thread."""
    one, two = _Pass(), _Pass()
    one.other, two.other = two, one

    def begin() -> U:
        two.turn.acquire()
        return two.run(second)

    begun = _worker().submit(begin)
    try:
        found = one.run(first)
    except AbandonedError:
        begun.result()  # what the other has failed of
        raise
    finally:
        error = begun.exception()
        timeline.resume()
    if error is not None:
        raise error
    return found, begun.result()


@cache
def _worker() -> Any:
    """One thread for all second passes: each thread that computes has others of its own."""
    return ThreadPoolExecutor(1, "second pass")
