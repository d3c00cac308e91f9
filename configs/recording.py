"""What a run keeps and tells: checkpoints, whoever watches, traces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from configs.limits import Amount, Count, Limits, Steps


@dataclass
class CheckpointConfig:
    save_every: Amount = 0  # steps; 0 saves only at the end
    keep_last: Count = 2
    keep_every: Amount = 0  # steps whose multiples are never deleted; 0 = none
    resume: str = "auto"  # auto | never | a folder: of another run, or of one checkpoint
    async_save: bool = True
    save_at_end: bool = True
    # Starts from one checkpoint that do not get as far as the next, before resume=auto refuses.
    max_restarts: Count = 5
    # Keys that may differ from the checkpoint's although they change what the model computes.
    allow_changes: list[str] = field(default_factory=list)


@dataclass
class WatchConfig:
    """Who is told of a run beside the files in its folder. Rank 0 tells."""

    # Where rank 0 answers Prometheus at /metrics, on all its addresses; null: nowhere
    prometheus_port: Annotated[int, Limits(1, 65535)] | None = None
    # MLflow's tracking URI, a server's address as a rule; null: nobody
    mlflow: str | None = None


@dataclass
class ProfileConfig:
    """A trace of what the ranks do: computing, communication inside and between nodes."""

    steps: list[Steps] = field(default_factory=list)  # numbers of steps, the first is 1
