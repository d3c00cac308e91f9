"""A run on two nodes, killed, frozen and cut: `python -m tests.drills.cluster [EVENTS [SEED]]`.

Two nodes of `tests.cluster` run `launch/torchrun.sh` with restarts, a rank each, over a slow link,
and twenty times, at random (seeded): a rank is killed, or all that runs on a node (which boots
again and starts the same script), a rank is stopped (SIGSTOP), or a node's cable is pulled, for
longer than the timeout of collectives. Each time the run must go on by itself from its newest
complete checkpoint. In the end every step is there once, with the loss of a run that nobody
disturbed, to the last bit.

It needs root: see `python -m tests.cluster --help`. Twenty events take about half an hour.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import Cluster, Node, obstacle
from tests.cluster.network import wait_until
from tests.drills.kills import MODEL, ROOT, losses, metrics

PATIENCE = 600.0  # seconds, on a machine that does other things too
TIMEOUT = 15.0  # seconds, of the run's collectives
RATE = "16mbit"  # a few steps a second
CUTS = (30.0, 60.0)  # seconds, both beyond the timeout
KINDS = ("kill rank", "kill node", "freeze rank", "cut link")
SEED = 11


@dataclass(frozen=True)
class Event:
    """What happens to which node."""

    kind: str
    node: int
    seconds: float = 0.0  # of a cut

    def __str__(self) -> str:
        return f"{self.kind} {self.node}" + (f", {self.seconds:.0f} s" if self.seconds else "")


@dataclass(frozen=True)
class Outcome:
    """What an event has led to; `wrong` is "" or what should have been otherwise."""

    event: Event
    step: int  # that was done when it happened
    resumed: int  # the checkpoint's
    seconds: float  # until the run went on from there
    wrong: str = ""

    def __str__(self) -> str:
        repeated = self.step - self.resumed
        return (
            f"{self.event!s:<22} {self.step:>6} {self.resumed:>12} {repeated:>9} "
            f"{self.seconds:>8.0f}   {self.wrong or 'as it should'}"
        )


HEAD = f"{'event, node':<22} {'step':>6} {'resumed from':>12} {'repeated':>9} {'seconds':>8}"


def events(count: int, seed: int) -> list[Event]:
    """Random ones, every kind as often as the others."""
    chance = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    chance.shuffle(kinds)
    return [
        Event(kind, chance.randrange(2), chance.choice(CUTS) if kind == "cut link" else 0.0)
        for kind in kinds
    ]


class Job:
    """A run on the nodes of a cluster, each started by the script that its users start."""

    def __init__(self, cluster: Cluster, run_dir: Path, steps: int = 10**6) -> None:
        self.cluster, self.run_dir = cluster, run_dir
        self.logs = run_dir.parent / f"{run_dir.name}.logs"
        self.logs.mkdir(exist_ok=True)
        settings = [setting for setting in MODEL if not setting.startswith("launch.")]
        settings += [f"run_dir={run_dir}", f"train.steps={steps}", "checkpoint.save_every=10"]
        settings += [f"launch.timeout_minutes={TIMEOUT / 60}", "train.validate_every=0"]
        self.command = [str(ROOT / "launch" / "torchrun.sh"), *settings]
        self.boots = [0] * len(cluster.nodes)
        self.running = [self.boot(node) for node in cluster.nodes]

    def boot(self, node: Node) -> subprocess.Popen[bytes]:
        """Start the script on a node, as its init system does."""
        self.boots[node.rank] += 1
        environ = self.cluster.environment(node)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del environ[name]  # torchrun's to say
        environ = {name: value for name, value in environ.items() if not name.startswith("PET_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environ |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environ |= {"PROCESSES": "1", "MAX_RESTARTS": "50"}
        with (self.logs / f"node{node.rank}").open("ab") as log:
            return node.start(self.command, env=environ, stdout=log, stderr=subprocess.STDOUT)

    def log(self, node: int) -> str:
        """All that a node has said."""
        return (self.logs / f"node{node}").read_text(errors="replace")

    def step(self) -> int:
        """The last one done."""
        return max(losses(self.run_dir), default=0)

    def saved(self) -> list[int]:
        """Steps of complete checkpoints."""
        return sorted(int(p.parent.name[5:]) for p in self.run_dir.glob("checkpoints/step_*/man*"))

    def rank(self, node: int) -> int:
        """The process of a node's rank, 0 where there is none: a child of its torchrun."""
        for pid in self.cluster.nodes[node].processes():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
                above = Path(f"/proc/{parent}/cmdline").read_bytes()
            except OSError:
                continue
            if "pangu.train" in command and b"\0RANK=" in environ and b"torchrun" in above:
                return pid
        return 0

    def _there(self, node: int) -> int:
        wait_until(lambda: bool(self.rank(node)), PATIENCE, f"a rank on node {node}")
        return self.rank(node)

    def starts(self) -> list[int]:
        """The steps of the checkpoints from which rank 0 has gone on, one a start."""
        return [int(step) for step in re.findall(r"resuming from \S*step_(\d+)", self.log(0))]

    def suffer(self, event: Event) -> Outcome:
        """Do it, and wait until the run has gone on by itself."""
        before, node = self.step(), self.cluster.nodes[event.node]
        ready = max(before + 3, *(step + 3 for step in self.saved()[-1:]), 13)
        wait_until(lambda: self.step() >= ready and bool(self.rank(event.node)), PATIENCE, "steps")
        step, starts, saved = self.step(), len(self.starts()), self.saved()
        happened = time.monotonic()
        self._do(event, node)
        try:
            wait_until(lambda: len(self.starts()) > starts, PATIENCE, "another start")
        except TimeoutError as error:
            return Outcome(event, step, 0, time.monotonic() - happened, str(error))
        resumed = self.starts()[-1]
        wrong = "" if resumed >= saved[-1] else f"checkpoint {saved[-1]} is lost"
        return Outcome(event, step, resumed, time.monotonic() - happened, wrong)

    def _do(self, event: Event, node: Node) -> None:
        if event.kind == "kill node":
            node.kill()
            self.running[node.rank].wait()
            time.sleep(2)
            self.running[node.rank] = self.boot(node)
        elif event.kind == "cut link":
            node.cut()
            time.sleep(event.seconds)
            node.mend()
        else:
            stop = signal.SIGSTOP if event.kind == "freeze rank" else signal.SIGKILL
            os.kill(self._there(node.rank), stop)

    def stop(self) -> list[int]:
        """Have it save and leave; the nodes' exit codes."""
        os.kill(self._there(0), signal.SIGTERM)  # all ranks follow after the same step
        return self.wait()

    def wait(self) -> list[int]:
        """Until it has come to its end; the nodes' exit codes."""
        return [process.wait(PATIENCE) for process in self.running]


def drill(what: Sequence[Event], folder: Path, say: Callable[[str], None]) -> list[str]:
    """What was wrong, after all events, when the run was told to stop."""
    wrong: list[str] = []
    with Cluster(2, RATE) as cluster:
        job = Job(cluster, folder / "run")
        say(HEAD)
        for event in what:
            outcome = job.suffer(event)
            say(str(outcome))
            if outcome.wrong:
                wrong += [f"{event}: {outcome.wrong}", *(job.log(n)[-3000:] for n in range(2))]
                return wrong
        codes, steps = job.stop(), job.step()
        if any(codes):
            wrong.append(f"told to stop, the run ended with {codes}: {job.log(0)[-3000:]}")
        for node in cluster.nodes:
            node.limit(None)
        undisturbed = Job(cluster, folder / "undisturbed", steps)
        if any(codes := undisturbed.wait()):
            wrong.append(f"undisturbed, it ended with {codes}: {undisturbed.log(0)[-3000:]}")
    rows = [row["step"] for row in metrics(folder / "run") if "loss" in row]
    if rows != list(range(1, steps + 1)):
        wrong.append("steps are missing, or there twice")
    found, expected = losses(folder / "run"), losses(folder / "undisturbed")
    differ = [step for step in expected if found.get(step) != expected[step]]
    if differ or not expected:
        wrong.append(f"other losses than undisturbed, from step {(differ or [1])[0]}")
    say(f"{steps} steps, {len(differ)} of them with another loss than undisturbed")
    return wrong


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 when anything was lost."""
    if reason := obstacle():
        print(reason, file=sys.stderr)
        return 2
    count, seed = (int(text) for text in [*arguments, *("20", str(SEED))[len(arguments) :]])
    with tempfile.TemporaryDirectory() as folder:
        wrong = drill(events(count, seed), Path(folder), lambda line: print(line, flush=True))
    print("\n".join(wrong) or "nothing was lost")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
