"""Train: `python -m pangu.train [group=option] [key=value] …`, alone or under any launcher.

Alone, it starts `launch.processes` processes on this machine. Under torchrun, msrun or srun it
joins the others. `-m` runs one job per combination of comma-separated values (see `pangu.sweep`).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from launch import environment
from launch.environment import LauncherError, ProcessEnvironment

if TYPE_CHECKING:
    from configs.schema import Config
    from configs.violation import Violation

# glibc caches freed small chunks by thread. Those between two tensors keep the tensors' memory from
# becoming one piece again, and the heap grows from step to step.
WHOLE_HEAP = ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")

USAGE = """usage: python -m pangu.train [-m] [group=option] [key=value] ...

  python -m pangu.train experiment=quickstart run_dir=runs/first train.steps=100
  python -m pangu.train -m moe=moge,top_k optimizer.lr=1e-3,3e-4
  torchrun --nproc-per-node 8 -m pangu.train model=pangu_pro_moe parallel=pangu_pro

python -m pangu.doctor [the same arguments] checks a configuration without running it.

Keys, with their meaning and default, are in configs/schema.py (train.steps, optimizer.lr, ...);
groups and their options are:
"""

_HEAD_START = 3.0  # seconds


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 done, 1 the last steps are in no checkpoint, 2 a mistake of the user's,
    3 the run diverged, 4 other ranks are lost, 128 + N ended by signal N."""
    # First of all, before any import that costs time or any file: see launch.environment.
    if environment.is_msrun_scheduler(os.environ):
        return 0
    try:
        process = environment.read(os.environ)
    except LauncherError as error:
        print(error, file=sys.stderr)
        return 2
    # torchrun leaves its processes behind when it is killed.
    if {environment.STARTED_BY, "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        from pangu.processes import die_with_parent

        die_with_parent()
    options = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if {"-h", "--help"} & set(options):
        print(USAGE + _groups())
        return 0
    if set(options) - {"-m", "--multirun"}:
        sentence = f"unknown option {options[0]}: settings are written key=value"
        return _refuse(process, process.rank == 0, sentence)
    if options:
        return _sweep(process, overrides)
    return _train(process, overrides)


def _sweep(process: ProcessEnvironment, overrides: list[str]) -> int:
    if process.launched:
        return _refuse(
            process,
            process.rank == 0,
            f"-m inside a job that {process.launcher} started would repeat the sweep on every "
            "rank: start the sweep itself with python -m pangu.train -m",
        )
    from pangu.sweep import sweep

    return sweep(overrides)


def _train(process: ProcessEnvironment, overrides: list[str]) -> int:
    from configs.violation import ConfigError
    from pangu import preflight
    from pangu.data import DataError
    from pangu.run_lock import hold

    try:
        config, policy = preflight.resolve(process, overrides)
    except ConfigError as error:
        # The same on every rank; files, on every rank of a node.
        only_files = all(violation.key.startswith("data.") for violation in error.violations)
        speaks = process.rank == 0 or (only_files and process.local_rank == 0)
        return _refuse(process, speaks, error.violations)
    if policy and config.backend.name == "cpu":
        _keep_the_heap_whole(process, config)
    # What pangu.train has started itself is covered by its own lock.
    locks = process.rank == 0 and process.launcher != "local"
    try:
        with hold(Path(config.run_dir)) if locks else nullcontext() as lock:
            if policy and process.rank == 0 and process.launcher != "local":
                print(policy.table(), file=sys.stderr, flush=True)
            return _start(process, config, overrides, lock)
    except DataError as error:
        return _refuse(process, True, f"error: {error}")
    except ConfigError as error:
        # What only the run can find is the same on every rank of a node, but for a missing device.
        device = any(violation.key == "backend" for violation in error.violations)
        return _refuse(process, device or process.local_rank == 0, error.violations)


def _keep_the_heap_whole(process: ProcessEnvironment, config: Config) -> None:
    """A limit of memory holds on such a heap alone, and glibc is told when a process begins: one
    that began without it begins again."""
    starts_others = not process.launched and config.launch.processes > 1
    if __name__ == "__main__" and WHOLE_HEAP[0] not in os.environ and not starts_others:
        os.environ.update([WHOLE_HEAP])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _start(
    process: ProcessEnvironment, config: Config, overrides: list[str], lock: int | None
) -> int:
    """Start the ranks of this machine, or be one of them; `lock` is the run folder's."""
    from configs.check import warnings
    from pangu.violation_table import print_warnings

    if not process.launched and config.launch.processes > 1:
        from pangu.data.stdlib import prepare_standard_library
        from pangu.local_launch import start_local

        if config.data.name == "stdlib":  # where its progress is seen: before there are ranks
            prepare_standard_library(config.data.cache_dir, config.model.vocab_size)
        if config.backend.name == "cpu":
            os.environ.setdefault(*WHOLE_HEAP)
        command = [sys.executable, "-m", "pangu.train", *overrides]
        kept_open = [] if lock is None else [lock]
        return start_local(command, config.launch.processes, Path(config.run_dir), kept_open)
    if process.rank == 0:
        print_warnings(warnings(config))
    from pangu.local_launch import prepare_environment

    process = prepare_environment(config, process)
    # The first import of torch: everything above has passed.
    from pangu.training.run import run

    return run(config, process)


def _refuse(process: ProcessEnvironment, speaks: bool, why: Sequence[Violation] | str) -> int:
    """Exit code 2, with the reason where this process `speaks` for those that refuse alike."""
    if not speaks:
        # A launcher ends the others once one has left: the one that speaks comes first.
        time.sleep(_HEAD_START if process.launcher not in ("none", "local") else 0)
    elif isinstance(why, str):
        print(why, file=sys.stderr)
        environment.report_refusal(os.environ, why)
    else:
        from pangu.violation_table import print_violations

        print_violations(why)
        environment.report_refusal(os.environ, "\n".join(map(str, why)))
    return 2


def _groups() -> str:
    from configs import groups

    return "\n".join(f"  {name}: {', '.join(options)}" for name, options in groups().items())


if __name__ == "__main__":
    # Ctrl-C simply ends what has not begun; once there is something to save, the run listens.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
