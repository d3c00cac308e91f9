"""A disk without room, at a run's start and where it goes on.

`python -m tests.drills.full_disk`: the run folder lies on a small disk in memory, of which so many
KiB are free; then on a large one, where no file may become larger than so many KiB. With numbers of
KiB as arguments: these, on a small disk if one may be mounted, else with small files.

The run must end with a sentence: exit code 2 where nothing could begin, 1 where the last steps are
in no checkpoint, 0 where there was room enough. No checkpoint that was whole may be gone. When
there is room, the same command must bring it to its end with the losses of a run that nobody
disturbed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.drills.damages import END, SAVED, Drill, Run, losses, whole

DISK = 16 << 20  # bytes
FREE = (0, 4, 16, 64, 80, 120, 200, 600, 1000, 1100, 2200, 4400)  # KiB
LEAST = 4  # KiB of a file, which the run's own output needs
ROOM = ("No space left", "room", "too large", "quota")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of `DISK` bytes at `folder`; whether this process may have one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "drill", str(folder)]
    mounted = os.getuid() == 0 and not subprocess.run(command, capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, free: int) -> Path:
    """Leave so many KiB."""
    state = os.statvfs(folder)
    path = folder / "filled"
    if (size := state.f_bavail * state.f_frsize - (free << 10)) > 0:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    return path


def wrong_with(run: Run, drill: Drill, run_dir: Path, before: int) -> list[str]:
    """What should have been otherwise in a run without room."""
    wrong = []
    if run.code not in (0, 1, 2):
        wrong.append(run.outcome)
    if "Traceback" in run.said:
        wrong.append("traceback")
    if run.code and not any(word in run.said for word in ROOM):
        wrong.append("nothing is said about room")
    if len(whole(run_dir, drill.checkpoints)) < before:
        wrong.append("a whole checkpoint is gone")
    if run.code == 0 and losses(run_dir) != drill.losses:
        wrong.append("losses are not those of an undisturbed run")
    return wrong


def attempt(drill: Drill, run_dir: Path, resume: bool, free: int, on_disk: bool) -> tuple[Run, str]:
    """A run without room, and then with it; the first, and what was wrong with either."""
    if resume:
        shutil.copytree(drill.sound, run_dir)
    before = len(whole(run_dir, drill.checkpoints))
    if on_disk:
        filled = fill(run_dir.parent, free)
        run = Run(run_dir)
        filled.unlink(missing_ok=True)
    else:
        run = Run(run_dir, largest_file=max(free, LEAST) << 10)
    wrong = wrong_with(run, drill, run_dir, before)
    again = Run(run_dir)
    if again.code or losses(run_dir) != drill.losses:
        wrong.append(f"with room: {again.outcome}, {len(losses(run_dir))} of {END} steps")
    shutil.rmtree(run_dir, ignore_errors=True)
    return run, "; ".join(wrong)


def main(chosen: list[str]) -> int:
    """Print a table of outcomes; 1 when one of them is wrong."""
    frees = [int(free) for free in chosen] or FREE
    bad = tried = 0
    print("| run | limit | KiB | exit code | outcome | what was said |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as top, small_disk(Path(top) / "disk") as may_mount:
        drill = Drill(Path(top))
        for on_disk in (True, False) if may_mount and not chosen else (may_mount,):
            folder = Path(top, "disk" if on_disk else "limited", "run")
            limit = "free" if on_disk else "largest file"
            for resume in (False, True):
                kind = f"from step {SAVED}" if resume else "new"
                for free in frees:
                    run, wrong = attempt(drill, folder, resume, free, on_disk)
                    tried, bad = tried + 1, bad + bool(wrong)
                    said = run.sentence.replace(str(folder), "run")
                    line = (
                        f"| {kind} | {limit} | {free} | {run.code} | {wrong or 'right'} | {said} |"
                    )
                    print(line, flush=True)
    print(f"{tried} runs without room, {bad} wrong" + ("" if may_mount else ", no disk mounted"))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
