"""What the framework costs beside the operators: short runs of `pangu.train` of a model so narrow
that nothing else is left, at two depths, alone and over several processes; and one of a wider
model, for what the allocator holds beyond what is in use."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.compose import load
from pangu.report.run_files import METRICS, read_metrics
from simulator.api import LayerCount, count_layer, predict

SHORT_RUN = [
    "model=moge_tiny",
    "data=synthetic",
    "optimizer.warmup_steps=0",
    "train.validate_every=0",
    "checkpoint.save_at_end=false",
    "checkpoint.resume=never",
]
NARROW = [
    *SHORT_RUN,
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
    "model.kv_channels=8",
    "model.vocab_size=128",
    "model.moe_ffn_hidden_size=8",
    "model.shared_expert_ffn_hidden_size=8",
    "train.micro_batch_size=1",
    "train.seq_length=16",
]
DEPTHS = (2, 8)
WIDE = [
    *SHORT_RUN,
    "model.num_layers=2",
    "model.hidden_size=256",
    "model.num_attention_heads=8",
    "model.moe_ffn_hidden_size=128",
    "train.micro_batch_size=4",
    "train.seq_length=192",
]
WARM_UP = 3


@dataclass(frozen=True)
class Framework:
    """Seconds that the framework adds to each operator that the simulator counts, and to each
    step, and that a message costs in a step beside moving its bytes (calling it, waking up,
    waiting for the others); bytes that a process holds without a model; what it holds with one
    beyond what is counted, as a part of what comes and goes within a step that keeps all."""

    operator_seconds: float
    step_seconds: float
    message_seconds: float
    base_bytes: float
    memory_overhead: float


def runs(processes: int) -> int:
    """How many runs `measure` makes."""
    return (len(DEPTHS) + 1) * (2 if processes > 1 else 1)


def measure(
    backend: list[str], processes: int, quick: bool, say: Callable[[str], None]
) -> Framework:
    """Run the narrow model at two depths, alone and over `processes`, then the wide one.

    `backend` are overrides, the first of them `backend=…`.

    Raises:
        RuntimeError: a run failed; the message is the last line that it said.
    """
    steps = f"train.steps={8 if quick else 40}"
    alone, base = _depths([*backend, steps], 1, say)
    per_layer = _per_layer(alone)
    message, overhead = 0.0, _overhead(backend, 1, base, quick, say)
    if processes > 1:
        together, base = _depths([*backend, steps], processes, say)
        messages = _counted(_expert_parallel(processes), backend[0]).messages
        message = max(_per_layer(together) - per_layer, 0.0) / messages
        # Processes that talk all the time leave more holes than such as talk little.
        overhead = (overhead + _overhead(backend, processes, base, quick, say)) / 2
    counted = _counted(1, backend[0])
    operator = per_layer / counted.operators
    step = max(alone[0] - DEPTHS[0] * per_layer - counted.end_operators * operator, 0.0)
    return Framework(operator, step, message, base, overhead)


def _overhead(
    backend: list[str], processes: int, base: float, quick: bool, say: Callable[[str], None]
) -> float:
    """`Framework.memory_overhead` of the wide model's process."""
    say(f"framework, wide, {processes} processes")
    overrides = [
        *WIDE,
        *backend,
        f"launch.processes={processes}",
        f"train.global_batch_size={4 * processes}",
        f"parallel.expert_model_parallel_size={_expert_parallel(processes)}",
    ]
    rows = _run([*overrides, f"train.steps={6 if quick else 20}"])
    return beyond_counted(
        [*overrides, f"hardware.{backend[0]}"], rows[-1]["memory_gib"] * 2**30 - base
    )


def beyond_counted(overrides: list[str], held: float) -> float:
    """Bytes that a process holds, less those that the simulator counts, as a part of what would
    come and go within a step that recomputes and swaps nothing. `hardware.backend=…` among the
    overrides says which precision `auto` means.
    """
    memory = predict(load(["hardware=a100", *overrides])).stages[0].memory
    return max((held - float(memory.peak)) / float(memory.leaves_holes), 0.0)


def _depths(
    overrides: list[str], processes: int, say: Callable[[str], None]
) -> tuple[list[float], float]:
    """Seconds of a step of the narrow model at each depth, and the bytes of a process.

    The lower quartile of the steps: one of some milliseconds is easily interrupted.
    """
    layout = [
        f"launch.processes={processes}",
        f"train.global_batch_size={processes}",
        f"parallel.expert_model_parallel_size={_expert_parallel(processes)}",
    ]
    seconds, memory = [], []
    for depth in DEPTHS:
        say(f"framework, {depth} layers, {processes} processes")
        rows = _run([*NARROW, *layout, f"model.num_layers={depth}", *overrides])
        steps = [row["step_seconds"] for row in rows[WARM_UP:]]
        seconds.append(statistics.quantiles(steps, n=4)[0])
        memory.append(rows[-1]["memory_gib"])
    return seconds, min(memory) * 2**30


def _expert_parallel(processes: int) -> int:
    """The most that divides both the processes and the narrow model's experts."""
    return math.gcd(processes, load(NARROW).model.num_experts)


def _per_layer(seconds: list[float]) -> float:
    return max((seconds[1] - seconds[0]) / (DEPTHS[1] - DEPTHS[0]), 0.0)


def _counted(expert_parallel: int, backend: str) -> LayerCount:
    """What the simulator counts in the narrow model."""
    sizes = [f"parallel.expert_model_parallel_size={expert_parallel}"]
    sizes += [f"devices={expert_parallel}", f"hardware.{backend}"]
    return count_layer(load([*NARROW, "hardware=a100", *sizes]))


def _run(overrides: list[str]) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pangu.train", *overrides, f"run_dir={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise RuntimeError(f"pangu.train failed with exit code {done.returncode}: {said[-1]}")
        rows = read_metrics(Path(folder, "run", METRICS))
    return [row for row in rows if "step_seconds" in row]
