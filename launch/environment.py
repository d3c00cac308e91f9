"""The one place that reads what a launcher says about this process.

| launcher | rank | world | local rank | rendezvous |
|---|---|---|---|---|
| torchrun | RANK | WORLD_SIZE | LOCAL_RANK | MASTER_ADDR, MASTER_PORT |
| msrun | RANK_ID | MS_WORKER_NUM | DEVICE_ID | MS_SCHED_HOST, MS_SCHED_PORT + 1 |
| Slurm (srun) | SLURM_PROCID | SLURM_STEP_NUM_TASKS | SLURM_LOCALID | the step's first node |
| none | 0 | 1 | 0 | - |

No torch here: a launcher's mistake is reported before anything heavy is imported.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Launcher = Literal["torchrun", "msrun", "slurm", "local", "none"]

# Set for the processes that `pangu.train` starts itself, beside torchrun's own variables.
STARTED_BY = "PANGU_STARTED_BY"


class LauncherError(ValueError):
    """A launcher's environment from which no rank can be told; the message says what to do."""


@dataclass(frozen=True)
class ProcessEnvironment:
    """This process among all processes of the run."""

    launcher: Launcher = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process and its peers."""
        return self.launcher != "none"

    def count_is_set_by(self) -> tuple[str, str]:
        """The variable that says how many processes there are, and what the user sets it with."""
        match self.launcher:
            case "torchrun":
                nodes = "--nnodes x " if self.local_world_size < self.world_size else ""
                return "WORLD_SIZE", f"torchrun {nodes}--nproc_per_node"
            case "msrun":
                return "MS_WORKER_NUM", "msrun --worker_num"
            case "slurm":
                return "SLURM_STEP_NUM_TASKS", "srun --ntasks"
            case _:
                return "WORLD_SIZE", "launch.processes"

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Write the variables that torch's `env://` rendezvous reads."""
        environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def report_refusal(environ: Mapping[str, str], reason: str) -> None:
    """Leave the reason where torchrun looks for it, to end its account of a failed job with."""
    if path := environ.get("TORCHELASTIC_ERROR_FILE"):
        time_of_it = {"timestamp": str(int(time.time()))}
        record = {"message": {"message": reason, "extraInfo": time_of_it}}
        Path(path).write_text(json.dumps(record))


def is_msrun_scheduler(environ: Mapping[str, str]) -> bool:
    """Whether this is the extra copy that msrun starts on the master for its own rendezvous.

    It must exit 0 before it imports torch or writes a file.
    """
    return environ.get("MS_ROLE") == "MS_SCHED"


def read(environ: Mapping[str, str]) -> ProcessEnvironment:
    """This process as its launcher describes it.

    torchrun comes first, because it may run inside a Slurm step.

    Raises:
        LauncherError: a launcher was there, but a variable is missing or makes no sense.
    """
    if "RANK" in environ or "TORCHELASTIC_RUN_ID" in environ:
        found = _torchrun(environ)
    elif environ.get("MS_ROLE") == "MS_WORKER":
        found = _msrun(environ)
    elif "SLURM_PROCID" in environ and _integer(environ, "SLURM_STEP_NUM_TASKS", "srun", 1) > 1:
        found = _slurm(environ)
    else:
        return ProcessEnvironment()
    if not 0 <= found.rank < found.world_size:
        raise LauncherError(
            f"{found.launcher} says rank {found.rank} of {found.world_size} processes"
        )
    if not 0 < found.local_world_size <= found.world_size:
        raise LauncherError(
            f"{found.launcher} says {found.local_world_size} of {found.world_size} processes are "
            "on this node"
        )
    return found


def _torchrun(environ: Mapping[str, str]) -> ProcessEnvironment:
    world = _integer(environ, "WORLD_SIZE", "torchrun")
    return ProcessEnvironment(
        launcher="local" if environ.get(STARTED_BY) == "local" else "torchrun",
        rank=_integer(environ, "RANK", "torchrun"),
        world_size=world,
        local_rank=_integer(environ, "LOCAL_RANK", "torchrun"),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", "torchrun", world),
        master_addr=_text(environ, "MASTER_ADDR", "torchrun"),
        master_port=_integer(environ, "MASTER_PORT", "torchrun"),
    )


def _msrun(environ: Mapping[str, str]) -> ProcessEnvironment:
    if "RANK_ID" not in environ:
        raise LauncherError(
            "msrun set no RANK_ID: with several nodes, give every node its --node_rank"
        )
    world = _integer(environ, "MS_WORKER_NUM", "msrun")
    return ProcessEnvironment(
        launcher="msrun",
        rank=_integer(environ, "RANK_ID", "msrun"),
        world_size=world,
        local_rank=_integer(environ, "DEVICE_ID", "msrun"),
        # msrun does not say how many workers share the node; launch/msrun.sh exports it.
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", "msrun", world),
        master_addr=_text(environ, "MS_SCHED_HOST", "msrun"),
        # msrun's own rendezvous holds MS_SCHED_PORT itself.
        master_port=_integer(environ, "MS_SCHED_PORT", "msrun") + 1,
    )


def _slurm(environ: Mapping[str, str]) -> ProcessEnvironment:
    nodes = environ.get("SLURM_STEP_NODELIST") or _text(environ, "SLURM_JOB_NODELIST", "srun")
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"])
    counts = tasks_per_node(tasks)
    node = _integer(environ, "SLURM_NODEID", "srun", 0)
    if node >= len(counts):
        raise LauncherError(f"srun says node {node}, and tasks on nodes: {tasks}")
    job = _integer(environ, "SLURM_JOB_ID", "srun", 0)
    return ProcessEnvironment(
        launcher="slurm",
        rank=_integer(environ, "SLURM_PROCID", "srun"),
        world_size=_integer(environ, "SLURM_STEP_NUM_TASKS", "srun"),
        local_rank=_integer(environ, "SLURM_LOCALID", "srun"),
        local_world_size=counts[node],
        master_addr=environ.get("MASTER_ADDR") or first_node(nodes),
        # One port per job, so that two jobs that share a node do not meet.
        master_port=_integer(environ, "MASTER_PORT", "srun", 20000 + job % 20000),
    )


def first_node(nodelist: str) -> str:
    """The first host of Slurm's compressed list: `node[07-10,12],login1` gives `node07`."""
    prefix, bracket, ranges = nodelist.partition("[")
    if not bracket or "," in prefix:
        return prefix.split(",")[0]
    return prefix + re.split(r"[-,\]]", ranges)[0]


def tasks_per_node(text: str) -> list[int]:
    """Slurm's compressed counts: `4(x2),3` gives `[4, 4, 3]`."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    return counts


def _text(environ: Mapping[str, str], name: str, launcher: str) -> str:
    if not environ.get(name):
        raise LauncherError(f"{launcher} set no {name}")
    return environ[name]


def _integer(
    environ: Mapping[str, str], name: str, launcher: str, default: int | None = None
) -> int:
    if default is not None and name not in environ:
        return default
    value = _text(environ, name, launcher)
    if not value.isdecimal():
        raise LauncherError(f"{launcher} set {name}={value}, which is no number")
    return int(value)
