"""Where this rank is among its collectives: what a run that hangs asks of each of its ranks.

Every call of a process group enters here what it is (group, operation, the how-manieth of that
group) and leaves when it is over. When one fails, the ranks are asked where they are, through the
rendezvous store: a thread of each looks for the question, so that ranks also answer which compute,
or wait in another collective. A process that is stopped, dead or cut off does not answer.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

_ASKED, _HERE = "whereabouts/asked", "whereabouts/rank"
_LOOK = 1.0  # seconds


@dataclass
class Whereabouts:
    """The collective that a rank is in, or was in last. `ranks` are the group's, as numbers of the
    run; `number` counts the group's calls from 1."""

    step: int = 0
    group: str = ""
    ranks: tuple[int, ...] = ()
    operation: str = ""
    number: int = 0
    inside: bool = False
    since: float = 0.0  # seconds; while it is not told, the time at which it entered or left
    waited: float = 0.0  # seconds in collectives that are over, all together

    @property
    def collective(self) -> str:
        """The call, in words."""
        ranks = ", ".join(map(str, self.ranks))
        return f"{self.operation} number {self.number} of {self.group} (ranks {ranks})"

    @property
    def key(self) -> tuple[object, ...]:
        """The same for ranks that wait for each other."""
        return self.group, self.ranks, self.operation, self.number

    @contextlib.contextmanager
    def at(self, group: str, ranks: Sequence[int], operation: str, number: int) -> Iterator[None]:
        """Inside a collective; one that fails is not left."""
        self.group, self.ranks = group, tuple(ranks)
        self.operation, self.number = operation, number
        self.inside, entered = True, time.monotonic()
        self.since = entered
        yield
        self.inside, self.since = False, time.monotonic()
        self.waited += self.since - entered

    def told(self) -> str:
        """For another rank, with `since` as the seconds that have gone by."""
        passed = time.monotonic() - self.since if self.since else 0.0
        return json.dumps(asdict(self) | {"since": passed})

    @classmethod
    def heard(cls, text: str) -> Whereabouts:
        """From what another rank has told."""
        fields = json.loads(text)
        return cls(**fields | {"ranks": tuple(fields["ranks"])})


here = Whereabouts()


class Told:
    """An asynchronous call's work: others hear that this rank is at `place` while it waits."""

    def __init__(self, work: Any, place: tuple[str, Sequence[int], str, int]) -> None:
        self._work, self._place = work, place

    def wait(self) -> None:
        with here.at(*self._place):
            self._work.wait()


class Answers:
    """Of a rank to who asks where it is, from a thread of its own, until `stop`."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]  # a client does one thing at a time
        self._rank, self._over = rank, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="whereabouts")
        self._thread.start()

    def _run(self) -> None:
        # The store ends with the process that has it.
        with contextlib.suppress(RuntimeError):
            # Not a wait inside the store, from which a thread that the interpreter leaves behind
            # returns into nothing: the process would end by SIGABRT.
            while not self._over.wait(_LOOK):
                if self._store.check([_ASKED]):
                    self._store.set(f"{_HERE}/{self._rank}", here.told())
                    return

    def stop(self) -> None:
        """Before the interpreter ends."""
        self._over.set()
        self._thread.join(1.0)  # longer only where the store's host is stopped


def ask(store: dist.Store, ranks: int, seconds: float) -> dict[int, Whereabouts]:
    """Where the ranks are that answer within some seconds.

    Raises:
        RuntimeError: the store does not answer.
    """
    store.set(_ASKED, "")
    deadline = time.monotonic() + seconds
    keys = {rank: f"{_HERE}/{rank}" for rank in range(ranks)}
    found: dict[int, Whereabouts] = {}
    while len(found) < ranks and time.monotonic() < deadline:
        for rank in keys.keys() - found.keys():
            if store.check([keys[rank]]):
                found[rank] = Whereabouts.heard(store.get(keys[rank]).decode())
        time.sleep(0.1)
    return found


def describe(own: Whereabouts, ranks: int, found: dict[int, Whereabouts]) -> str:
    """Sentences on the collective that has failed: who has come to it, and where the others are."""
    if not own.number:  # before the first call, or a library that does not report
        silent = sorted(set(range(ranks)) - found.keys())
        return f"A collective failed; silent: {_numbers(silent)}." if silent else ""
    # Who waits for an asynchronous call has left it.
    at_it = {r: there for r, there in found.items() if there.inside or not own.inside}
    came = [rank for rank, there in at_it.items() if there.key == own.key]
    lines = [
        f"It failed in step {own.step}, in {own.collective}. Came to it: {_numbers(sorted(came))}."
    ]
    for rank in own.ranks:
        if rank in came:
            continue
        if rank not in found:
            lines.append(
                f"Did not come: rank {rank}. It does not answer: stopped, cut off or gone."
            )
            continue
        there = found[rank]
        where = f"in {there.collective}" if there.inside else f"computing, after {there.collective}"
        if not there.number:
            where = "before its first collective"
        lines.append(
            f"Did not come: rank {rank}, in step {there.step}, for {there.since:.0f} s {where}."
        )
    if outside := sorted(set(range(ranks)) - found.keys() - set(own.ranks)):
        lines.append(f"In other groups these do not answer: {_numbers(outside)}.")
    return "\n".join(lines)


def _numbers(ranks: Sequence[int]) -> str:
    name = "rank" if len(ranks) == 1 else "ranks"
    return f"{name} {', '.join(map(str, ranks))}" if ranks else "nobody"
