"""Thirty ways to end a run that somebody else chose: `python -m tests.drills.kills [NAME…]`.

One run of two processes is started again and again, and ended each time: its launcher, a rank, a
process that writes a checkpoint or one that reads data, by a signal, while it starts, steps,
validates or saves. After each: the terminal must say what happened, last and without a traceback;
no process may be left; no complete checkpoint may be gone. In the end the run is brought to its
end: every step is there once, with the loss of a run that nobody disturbed, to the last bit.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 240.0  # seconds, on a machine that does other things too
MARK = "PANGU_DRILL"  # in the environment of every process of a drill
MODEL = (
    *("model.hidden_size=32", "model.kv_channels=8", "model.vocab_size=256", "model.num_layers=2"),
    *("model.num_experts=8", "model.moe_ffn_hidden_size=32", "moe.top_k=2"),
    *("model.shared_expert_ffn_hidden_size=32", "moe.num_expert_groups=2", "data=synthetic"),
    *("train.seq_length=16", "train.global_batch_size=4", "train.micro_batch_size=1"),
    *("optimizer.lr=1e-3", "optimizer.warmup_steps=0", "optimizer.schedule=constant"),
    *("backend=cpu", "backend.threads=1", "launch.processes=2", "data.num_workers=1"),
    *("train.validate_every=5", "train.validation_batches=20"),
    *("checkpoint.save_every=4", "checkpoint.keep_last=3", "checkpoint.max_restarts=50"),
)


@dataclass(frozen=True)
class Kill:
    """`signal` to `victim` (launcher, rank 0, rank 1, writer N, reader N) when the run does
    `what` (start, step, validation, save)."""

    victim: str
    signal: signal.Signals
    what: str

    @property
    def name(self) -> str:
        return f"{self.victim}, {self.signal.name}, {self.what}"

    @property
    def rank(self) -> int:
        """Which rank is meant, or owns the process that is."""
        return int(self.victim.split()[-1])


def _kills() -> Iterator[Kill]:
    kill, term, hurt = signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV
    for what in ("start", "step", "validation", "save"):
        for victim in ("launcher", "rank 0", "rank 1"):
            yield Kill(victim, kill, what)
    for what in ("step", "validation", "save"):
        for victim in ("launcher", "rank 1"):
            yield Kill(victim, term, what)
    yield Kill("launcher", signal.SIGINT, "step")
    yield Kill("launcher", signal.SIGINT, "start")
    yield Kill("launcher", signal.SIGHUP, "validation")
    yield Kill("rank 0", signal.SIGINT, "save")
    yield Kill("rank 0", hurt, "step")
    yield Kill("rank 1", hurt, "validation")
    yield Kill("rank 1", signal.SIGABRT, "step")
    for rank in (0, 1):
        yield Kill(f"writer {rank}", kill, "save")
        yield Kill(f"reader {rank}", kill, "step")
    yield Kill("writer 1", term, "save")


KILLS = tuple(_kills())


@dataclass
class Outcome:
    """What a kill led to; `wrong` lists what should have been otherwise."""

    code: int
    last_line: str
    steps: int
    wrong: list[str] = field(default_factory=list)


class Drill:
    """A run folder, and what is done to the runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.mark = secrets.token_hex(8)
        self.was_killed = False

    def start(self, run_dir: Path, steps: int = 10**6) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pangu.train", *MODEL]
        with (self.folder / "output").open("w") as output:
            return subprocess.Popen(
                [*command, f"run_dir={run_dir}", f"train.steps={steps}"],
                env={**os.environ, "PYTHONPATH": str(ROOT), MARK: self.mark},
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def kill(self, kill: Kill) -> Outcome:
        """Start the run, end it, and look at what is left."""
        saved_before, killed_before = self.saved(), self.was_killed
        process = self.start(self.run_dir)
        pid = self._when(process, kill)
        os.kill(pid, kill.signal)
        self.was_killed = kill.victim == "launcher" and kill.signal == signal.SIGKILL
        if kill.victim.startswith("writer"):
            self._goes_on(process)
            process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        left = self._left_behind()
        output = self.output()
        lines = [line for line in output.splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        outcome = Outcome(process.returncode, last, max(losses(self.run_dir), default=0))
        outcome.wrong = [
            *expectation(kill, outcome, output, self.saved()),
            *(["a traceback"] if "Traceback" in output else []),
            *([f"processes left: {left}"] if left else []),
            *(f"checkpoint {step} is gone" for step in self.saved_gone(saved_before)),
        ]
        if killed_before and "was killed, or its host went down" not in output:
            outcome.wrong.append("the kill before it was not mentioned")
        return outcome

    def saved(self) -> list[int]:
        """Steps of complete checkpoints."""
        return sorted(int(p.parent.name[5:]) for p in self.run_dir.glob("checkpoints/step_*/man*"))

    def saved_gone(self, before: list[int]) -> list[int]:
        """Checkpoints that are missing, but for those older than the newest three."""
        now = self.saved()
        return [step for step in before[-1:] if step not in now and not (now and now[-1] > step)]

    def finish(self) -> list[str]:
        """Bring the run to its end; what differs from one that nobody disturbed."""
        steps = max(losses(self.run_dir)) + 3
        wrong = []
        for run_dir in (self.run_dir, self.folder / "undisturbed"):
            code = self.start(run_dir, steps).wait(PATIENCE)
            if code:
                wrong.append(f"{run_dir.name} ended with {code}: {self.output()[-2000:]}")
        found, expected = losses(self.run_dir), losses(self.folder / "undisturbed")
        rows = [row["step"] for row in metrics(self.run_dir) if "loss" in row]
        if rows != list(range(1, steps + 1)):
            wrong.append("steps are missing, or there twice")
        differ = [step for step in expected if found.get(step) != expected[step]]
        if differ:
            wrong.append(f"other losses than undisturbed, from step {differ[0]}")
        return wrong

    def _when(self, process: subprocess.Popen[str], kill: Kill) -> int:
        """Wait until the run does what it is to be ended in; the process to signal."""
        first = max(losses(self.run_dir), default=0)
        if kill.what == "start":
            wait_for(process, lambda: len(self._ranks(process)) == 2)
            time.sleep(1.0)
        else:
            # Rows of steps that are taken again go first.
            wait_for(process, lambda: 0 < self._step() != first or self._step() > first + 4)
            wait_for(process, lambda: self._now(kill.what, process))
        found: list[int] = []

        def there() -> bool:
            found[:] = self._victims(process, kill)
            return bool(found)

        wait_for(process, there)
        return found[0]

    def _step(self) -> int:
        return max(losses(self.run_dir), default=0)

    def _now(self, what: str, process: subprocess.Popen[str]) -> bool:
        if what == "validation":
            return self._step() % 5 == 0
        if what == "save":
            return bool(list(self.run_dir.glob("checkpoints/.step_*.partial")))
        return self._step() % 4 == 2

    def _ranks(self, process: subprocess.Popen[str]) -> list[int]:
        return children(process.pid)

    def _victims(self, process: subprocess.Popen[str], kill: Kill) -> list[int]:
        if kill.victim == "launcher":
            return [process.pid]
        ranks = self._ranks(process)
        if kill.victim.startswith("rank"):
            return ranks[kill.rank : kill.rank + 1]
        # A rank's own children: the one that has a checkpoint's file open writes it.
        own = children(ranks[kill.rank])
        writers = [pid for pid in own if any(".partial" in path for path in opened(pid))]
        if kill.victim.startswith("writer"):
            return writers
        return [pid for pid in own if pid not in writers]

    def _goes_on(self, process: subprocess.Popen[str]) -> None:
        """After a save has failed, training must take further steps."""
        step = self._step()
        wait_for(process, lambda: self._step() > step + 2)

    def _left_behind(self) -> list[int]:
        deadline = time.monotonic() + 20
        while (left := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


def expectation(kill: Kill, outcome: Outcome, output: str, saved: list[int]) -> list[str]:
    """What this kill should have led to, and did not."""
    name, number, code = kill.signal.name, int(kill.signal), outcome.code
    stops = kill.signal in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    wanted: dict[str, bool]
    if kill.victim.startswith("reader"):
        wanted = {"exit code 1": code == 1, "its end said": "reads data ahead has ended" in output}
    elif kill.victim.startswith("writer"):
        failed = "could not be saved" in output
        wanted = {"exit code 0": code == 0, "a word on the save": failed == (name == "SIGKILL")}
    elif kill.victim == "launcher" and not stops:
        wanted = {f"exit code {-number}": code == -number}
    elif stops and kill.what == "start":
        wanted = {"ended as wished": code in (0, 128 + number)}
    elif stops:
        stopped = f"told to stop after step {outcome.steps}" in output
        wanted = {"exit code 0": code == 0, "stopped": stopped}
        wanted["saved"] = saved[-1:] == [outcome.steps]
    else:
        said = outcome.last_line.startswith(f"rank {kill.rank} was ended by {name} ")
        wanted = {f"exit code {128 + number}": code == 128 + number, "rank and signal last": said}
        wanted["the step"] = f"step {outcome.steps}" in outcome.last_line or kill.what == "start"
    return [f"not {what}" for what, holds in wanted.items() if not holds]


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Poll until something is so.

    Raises:
        RuntimeError: the process has ended before, or it takes too long.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the run did not get there")
        time.sleep(0.002)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Whole rows of `metrics.jsonl`."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {row["step"]: row["loss"] for row in metrics(run_dir) if "loss" in row}


def children(pid: int) -> list[int]:
    """Processes that a process has started and that run, in order."""
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def opened(pid: int) -> list[str]:
    """Files that a process has open."""
    try:
        return [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


def marked(mark: str) -> list[int]:
    """Running processes with the mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def drill(kills: tuple[Kill, ...], folder: Path, say: Callable[[str], None]) -> list[str]:
    """All kills, one after another, and the run's end; everything that was wrong."""
    here, wrong = Drill(folder), []
    for kill in kills:
        try:
            outcome = here.kill(kill)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            outcome = Outcome(0, "", 0, [f"{error}: {here.output()[-1500:]}"])
            for pid in marked(here.mark):
                os.kill(pid, signal.SIGKILL)
        verdict = "; ".join(outcome.wrong) or "right"
        say(f"| {kill.name} | {outcome.steps} | {outcome.code} | {verdict} | {outcome.last_line} |")
        wrong += [f"{kill.name}: {what}" for what in outcome.wrong]
    end = here.finish()
    say(f"| to the end | | | {'; '.join(end) or 'every step once, losses as undisturbed'} | |")
    return wrong + end


def main(names: list[str]) -> int:
    """Print a table of outcomes; 1 when one of them is wrong."""
    kills = tuple(kill for kill in KILLS if not names or kill.name in names)
    print("| victim, signal, in | steps | exit code | outcome | last line |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        wrong = drill(kills, Path(folder), lambda line: print(line, flush=True))
    print(f"{len(kills)} kills, {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
