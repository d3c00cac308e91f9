"""`python -m pangu.train -m`: one job per combination of values, each in a folder of its own.

Values are written as Hydra's sweeps: `moe=moge,top_k`, `train.seed=range(3)`, `model=glob(pangu*)`.
A job runs as if it had been started by hand with `run_dir=<run_dir>/<key=value,key=value>`. A
sweep that is started again skips what is finished and resumes what is not.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from rich.table import Table

from configs import groups
from configs.compose import load
from configs.schema import Config
from configs.violation import ConfigError, Violation
from launch.environment import ProcessEnvironment
from pangu import preflight
from pangu.local_launch import child_environment
from pangu.plain_file import read_plain
from pangu.processes import last_step
from pangu.report.run_files import METRICS, read_metrics
from pangu.run_lock import SWEEP, hold
from pangu.violation_table import console, print_violations

MARKER = "sweep_job.json"


@dataclass(frozen=True)
class Job:
    """One combination. `overrides` are all of its arguments, its `run_dir` the last of them."""

    name: str
    overrides: list[str]
    config: Config

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `state` is finished, skipped (finished before), failed or interrupted."""

    state: str
    seconds: float = 0.0
    exit_code: int = 0


def sweep(overrides: list[str]) -> int:
    """Run every combination, one after another, and print a summary.

    Returns:
        0 when all jobs are finished, 1 when one failed, 2 for a mistake in the configuration,
        128 + N when signal N ended the sweep.
    """
    try:
        jobs = plan(overrides)
        with hold(jobs[0].run_dir.parent, SWEEP):
            return _run(jobs)
    except ConfigError as error:
        print_violations(error.violations)
        return 2


def _run(jobs: list[Job]) -> int:
    runner = _Runner()
    outcomes: list[Outcome] = []
    for number, job in enumerate(jobs, start=1):
        console().rule(f"job {number} of {len(jobs)}: {job.name}")
        outcomes.append(runner.run(job))
        if runner.interrupted_by:
            break
    _summarise(jobs, outcomes)
    if runner.interrupted_by:
        return 128 + runner.interrupted_by
    return int(any(outcome.state == "failed" for outcome in outcomes))


def plan(overrides: list[str]) -> list[Job]:
    """All jobs of a sweep, checked before the first one starts.

    Raises:
        ConfigError: a sweep that cannot be enumerated, or every violation of every job.
    """
    fixed, swept = _split(overrides)
    try:
        base = load([*fixed, *(values[0] for values in swept)]).run_dir
    except ConfigError:  # named below, with the jobs that it keeps from running
        base = ""
    jobs: list[Job] = []
    found: list[tuple[str, Violation]] = []
    for values in itertools.product(*swept):
        name = ",".join(re.sub(r"[^\w.=+\-\[\]]", "_", value) for value in values)
        run_dir = str(Path(base) / name)
        arguments = [*fixed, *values, f"run_dir={_quoted(run_dir)}"]
        verdict = preflight.examine(ProcessEnvironment(), arguments)
        if verdict.config is not None:
            jobs.append(Job(name, arguments, verdict.config))
        found += [(name, violation) for violation in verdict.found]
    if found:
        raise ConfigError(_merged(found, math.prod(map(len, swept))))
    return jobs


def _merged(found: list[tuple[str, Violation]], jobs: int) -> list[Violation]:
    """Each violation once, with the jobs that have it."""
    by_violation: dict[tuple[str, ...], list[str]] = {}
    for job, v in found:
        alike = (v.key, str(v.value), v.reason, v.suggestion)
        by_violation.setdefault(alike, []).append(job)
    merged = []
    for (key, value, reason, suggestion), names in by_violation.items():
        if len(names) == jobs:
            where = "in every job"
        else:
            where = f"in job {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
        merged.append(Violation(key, value, f"{where}: {reason}", suggestion))
    return merged


def _split(overrides: list[str]) -> tuple[list[str], list[list[str]]]:
    """The overrides that all jobs share, and one list of `key=value` per swept key."""
    parser = OverridesParser.create()
    fixed, swept, found = [], [], []
    for line in overrides:
        try:
            override = parser.parse_override(line)
        except Exception:  # load_checked names it, with what to write instead
            fixed.append(line)
            continue
        if not override.is_sweep_override():
            fixed.append(line)
        elif not override.is_discrete_sweep():
            reason = "an interval has no end of values"
            found.append(Violation(line, "", reason, "a,b,c or range(start,stop,step)"))
        elif override.key_or_group == "run_dir":
            reason = "the sweep names the folders of its jobs itself, below run_dir"
            found.append(Violation("run_dir", line, reason, "one run_dir"))
        else:
            values = _values(override)
            if not values:
                reason = "matches no option"
                hint = ", ".join(groups().get(override.key_or_group, []))
                found.append(Violation(line, "", reason, hint))
            swept.append([f"{override.get_key_element()}={value}" for value in values])
    if not swept and not found:
        reason = "-m without a list of values to sweep over"
        found.append(Violation("-m", "", reason, "key=a,b,c, or leave out -m"))
    if found:
        raise ConfigError(found)
    return fixed, swept


def _values(override: Override) -> list[str]:
    pattern: Any = override.value()
    if isinstance(pattern, Glob):
        return pattern.filter(groups().get(override.key_or_group, []))
    values = list(override.sweep_string_iterator())
    # As typed where that is plain, so that 1e-3 names a folder 1e-3 and not 0.001.
    typed = [text.strip() for text in str(override.input_line).partition("=")[2].split(",")]
    plain = len(typed) == len(values) and all(re.fullmatch(r"[\w.+-]+", text) for text in typed)
    return typed if plain else values


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


class _Runner:
    """Runs jobs in processes of their own and passes SIGINT and SIGTERM on to the current one."""

    def __init__(self) -> None:
        self.interrupted_by = 0
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def run(self, job: Job) -> Outcome:
        marker = job.run_dir / MARKER
        if _finished(marker) == job.overrides:
            console().print("finished before: skipped")
            return Outcome("skipped")
        start = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pangu.train", *job.overrides],
            env=child_environment("sweep"),
            start_new_session=True,
        )
        if self.interrupted_by:
            self._process.send_signal(self.interrupted_by)
        code = self._process.wait()
        seconds = time.monotonic() - start
        if code == 0 and last_step(job.run_dir) >= job.config.train.steps:
            marker.write_text(json.dumps(job.overrides))
            return Outcome("finished", seconds)
        # A run that was told to stop saves, and ends with 0 before its last step.
        state = "interrupted" if self.interrupted_by or code == 0 else "failed"
        return Outcome(state, seconds, code)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted_by = number
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def _finished(marker: Path) -> Any:
    """The arguments of the job that was finished there; None where none was."""
    try:
        return json.loads(read_plain(marker))
    except (OSError, ValueError, RecursionError):
        return None


def _summarise(jobs: list[Job], outcomes: list[Outcome]) -> None:
    table = Table(title="Sweep", title_justify="left")
    for heading in ("job", "state", "steps", "loss", "validation loss", "seconds"):
        table.add_column(heading, overflow="fold")
    for index, job in enumerate(jobs):
        outcome = outcomes[index] if index < len(outcomes) else Outcome("not started")
        state = f"failed ({outcome.exit_code})" if outcome.state == "failed" else outcome.state
        records = read_metrics(job.run_dir / METRICS)
        table.add_row(
            job.name,
            state,
            f"{last_step(job.run_dir)}/{job.config.train.steps}",
            _last(records, "loss"),
            _last(records, "validation_loss"),
            f"{outcome.seconds:.0f}",
        )
    console().print(table)


def _last(records: list[dict[str, Any]], key: str) -> str:
    values = [record[key] for record in records if isinstance(record.get(key), float)]
    return f"{values[-1]:.4f}" if values else "-"
