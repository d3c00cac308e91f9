"""A run's folder damaged in many ways: `python -m tests.drills.damages [NAME…]`.

A real run is made once. Each damage is done to a copy of its folder, where the trainer's command
then goes on: in a process forked from one that has imported everything and started nothing. It must
go on from the newest checkpoint or from the one before it, or end with exit code 2, in each case
with a sentence that names what is damaged, without a traceback, without running what a stranger has
put there; the steps from there on must have the losses of a run that nobody disturbed, to the last
bit; and every checkpoint that was whole must still be there.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from pangu.checkpoint import manifest
from pangu.engines.megatron.fitting import select_backend
from pangu.train import main as train
from tests.drills.checkpoint_damages import ANEW, CODE, DAMAGES, REFUSED, Damage
from tests.drills.kills import MODEL

ROOT = Path(__file__).parents[2]
NOBODY = 65534
PATIENCE = 120.0  # seconds
SAVED, END = 6, 8
COMMAND = (
    *(*MODEL, "launch.processes=1", "data.num_workers=0", "train.validate_every=0"),
    "backend.threads=1",
    *("checkpoint.save_every=2", "checkpoint.keep_last=10"),
)
Contents = dict[str, bytes]


class Run:
    """The trainer's command, once, in a forked process."""

    def __init__(
        self,
        run_dir: Path,
        overrides: tuple[str, ...] = (),
        unprivileged: bool = False,
        largest_file: int = resource.RLIM_INFINITY,
    ) -> None:
        self.arguments = [*COMMAND, f"run_dir={run_dir}", f"train.steps={END}", *overrides]
        self.unprivileged, self.largest_file = unprivileged, largest_file
        with tempfile.TemporaryFile() as output:
            pid = os.fork()
            if pid == 0:
                self._child(output.fileno())
            self.code = self._wait(pid)
            output.seek(0)
            self.said = output.read().decode(errors="replace")

    def _child(self, output: int) -> None:
        code = 1
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            if self.unprivileged and os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, self.largest_file))
            code = train(self.arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    @staticmethod
    def _wait(pid: int) -> int | None:
        """The exit code; None for a hang."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None

    @property
    def outcome(self) -> str:
        if self.code == 2:
            return REFUSED
        if self.code:
            return f"exit code {self.code}"
        if self.code is None:
            return "a hang"
        started = re.search(r"resuming from \S*/step_0*(\d+)", self.said)
        return f"from {started[1]}" if started else ANEW

    @property
    def sentence(self) -> str:
        """The lines that are not every run's own, in one."""
        own = (
            "moge_tiny",
            "step ",
            "run after",
            "resuming",
            "key ",
            "changed",
            "bigram",
            "unigram",
        )
        own += ("training loss", "/")
        lines = [" ".join(re.sub("[│┃|]", " ", line).split()) for line in self.said.splitlines()]
        words = [line for line in lines if re.match(r"[a-z]", line) and not line.startswith(own)]
        return "; ".join(words)[:400]


def contents(folder: Path) -> Contents:
    """Every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def whole(run_dir: Path, sound: list[Contents]) -> list[Contents]:
    """The checkpoints of the run that was made first that are somewhere in a folder."""
    places = [path.parent for path in run_dir.rglob("manifest.json")]
    held = [contents(place) for place in places]
    return [one for one in sound if any(one.items() <= other.items() for other in held)]


def losses(run_dir: Path) -> dict[int, float]:
    """Of every readable row, by step."""
    found: dict[int, float] = {}
    file = run_dir / "metrics.jsonl"
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, OverflowError):
            row = json.loads(line)
            found[int(row["step"])] = row["loss"]
    return found


class Drill:
    """A sound run, its losses when nobody disturbs it, and what becomes of damaged copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sound = folder / "sound"
        command = [sys.executable, "-m", "pangu.train", *COMMAND, f"train.steps={SAVED}"]
        subprocess.run(
            [*command, f"run_dir={self.sound}"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=folder,
            check=True,
            capture_output=True,
        )
        self.checkpoints = [contents(path) for path in (self.sound / "checkpoints").glob("step_*")]
        undisturbed = folder / "undisturbed"
        _import_what_is_needed(undisturbed)
        self.losses = losses(undisturbed)
        assert sorted(self.losses) == list(range(1, END + 1))

    def attempt(self, damage: Damage) -> tuple[Run, list[str]]:
        """Damage a copy and go on there; the run, and what was wrong with it."""
        run_dir = self.folder / "run"
        shutil.copytree(self.sound, run_dir)
        if damage.unprivileged and os.getuid() == 0:
            for path in (run_dir, *run_dir.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        damage.spoil(run_dir)
        before, rows = whole(run_dir, self.checkpoints), losses(run_dir)
        run = Run(run_dir, damage.overrides, damage.unprivileged)
        wrong = self._wrong(damage, run)
        if not os.getuid():
            _allow(run_dir)
            kept = whole(run_dir, self.checkpoints)
            if not damage.forgets and len(kept) < len(before):
                wrong.append(f"{len(before) - len(kept)} whole checkpoints are gone")
        if (run_dir / CODE).exists():
            wrong.append("code of the checkpoint was executed")
        if damage.forgets and not any(map(_is_sound, run_dir.glob("checkpoints/step_*"))):
            wrong.append("no whole checkpoint is left")
        if run.code == 0:
            wrong += self._wrong_rows(damage, run, run_dir, rows)
        shutil.rmtree(run_dir)
        return run, wrong

    def _wrong(self, damage: Damage, run: Run) -> list[str]:
        wrong = []
        if run.outcome != damage.outcome:
            wrong.append(f"{run.outcome}, not {damage.outcome}")
        if "Traceback" in run.said:
            wrong.append("traceback")
        if damage.says not in run.said:
            wrong.append(f"{damage.says!r} is not named")
        return wrong

    def _wrong_rows(
        self, damage: Damage, run: Run, run_dir: Path, before: dict[int, float]
    ) -> list[str]:
        start = int(run.outcome.removeprefix("from "))
        end = int(dict(line.split("=", 1) for line in run.arguments)["train.steps"])
        right = {step: loss for step, loss in before.items() if step <= start}
        right |= {step: self.losses[step] for step in range(start + 1, end + 1)}
        return [] if losses(run_dir) == right else ["losses are not those of an undisturbed run"]


def _is_sound(checkpoint: Path) -> bool:
    with contextlib.suppress(manifest.DamagedCheckpoint):
        return not manifest.damage(checkpoint, manifest.read(checkpoint))
    return False


def _allow(run_dir: Path) -> None:
    for path in (run_dir, *run_dir.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755)


def _import_what_is_needed(run_dir: Path) -> None:
    """Train undisturbed and be refused, in forked processes, to learn what they import; what is
    imported here they need not import again, nor be allowed to read."""
    select_backend("cpu")
    torch.set_num_threads(1)  # as `backend.threads` does before torch is imported
    listed = run_dir.with_suffix(".modules")
    for arguments in ([f"run_dir={run_dir}", f"train.steps={END}"], ["run_dir=/dev/null/x"]):
        pid = os.fork()
        if pid == 0:
            nowhere = os.open(run_dir.with_suffix(".output"), os.O_WRONLY | os.O_CREAT)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            with contextlib.suppress(BaseException):
                train([*COMMAND, *arguments])
                listed.write_text("\n".join(sys.modules))
            os._exit(0)
        os.waitpid(pid, 0)
        for name in listed.read_text().split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def main(names: list[str]) -> int:
    """Print a table of outcomes; 1 when one of them is wrong."""
    os.environ["COLUMNS"] = "1000"  # a sentence is not broken
    chosen = {name: damage for name, damage in DAMAGES.items() if not names or name in names}
    bad, kinds = 0, Counter[str]()
    print("| damage | outcome | right | what was said |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        drill = Drill(Path(top))
        for name, damage in chosen.items():
            run, wrong = drill.attempt(damage)
            bad += bool(wrong)
            kinds[run.outcome] += 1
            said = run.sentence.replace(str(drill.folder / "run"), "run")
            line = f"| {name} | {run.outcome} | {'; '.join(wrong) or 'yes'} | {said} |"
            print(line, flush=True)
    print(f"{len(chosen)} damages, {bad} wrong:", ", ".join(f"{n} {k}" for k, n in kinds.items()))
    return int(bool(bad) or len(chosen) < len(names))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
