"""What the framework costs beside the operators: two short runs of `pangu.train` of a model so
narrow that nothing else is left, one deeper than the other."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.compose import load
from pangu.report.run_files import METRICS, read_metrics
from simulator.evaluate import prepare
from simulator.layout import from_config

NARROW = [
    "model=moge_tiny",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
    "model.kv_channels=8",
    "model.vocab_size=128",
    "model.moe_ffn_hidden_size=8",
    "model.shared_expert_ffn_hidden_size=8",
    "data=synthetic",
    "optimizer.warmup_steps=0",
    "train.micro_batch_size=1",
    "train.global_batch_size=1",
    "train.seq_length=16",
    "train.validate_every=0",
    "checkpoint.save_at_end=false",
    "checkpoint.resume=never",
]
DEPTHS = (2, 8)
WARM_UP = 3


@dataclass(frozen=True)
class Framework:
    """Seconds that the framework adds to each operator that the simulator counts, and to each
    step; bytes that a process holds without a model."""

    operator_seconds: float
    step_seconds: float
    base_bytes: float


def measure(backend: list[str], quick: bool, say: Callable[[str], None]) -> Framework:
    """Run the narrow model twice.

    `backend` are overrides such as `backend=cpu`.

    Raises:
        RuntimeError: a run failed; the message is the last line that it said.
    """
    length = 8 if quick else 40
    seconds, memory = [], []
    for depth in DEPTHS:
        say(f"framework, {depth} layers")
        rows = _run([*NARROW, f"model.num_layers={depth}", f"train.steps={length}", *backend])
        steps = [row["step_seconds"] for row in rows[WARM_UP:]]
        # The lower quartile: a step of some milliseconds is easily interrupted.
        seconds.append(statistics.quantiles(steps, n=4)[0])
        memory.append(rows[-1]["memory_gib"])
    per_layer = max((seconds[1] - seconds[0]) / (DEPTHS[1] - DEPTHS[0]), 0.0)
    in_layer, outside = _operators()
    operator = per_layer / in_layer
    step = max(seconds[0] - DEPTHS[0] * per_layer - outside * operator, 0.0)
    return Framework(operator, step, min(memory) * 2**30)


def _operators() -> tuple[int, int]:
    """Operators that the simulator counts in one layer of the narrow model, and at its ends."""
    config = load([*NARROW, "hardware=a100"])
    blocks = prepare(config, from_config(config)).blocks
    assert blocks.moe is not None
    layer, *ends = (
        sum(1 for operator in block.operators if np.any(operator.bytes) and operator.count)
        for block in (blocks.moe, blocks.embedding, blocks.head)
    )
    return layer, sum(ends)


def _run(overrides: list[str]) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pangu.train", *overrides, f"run_dir={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise RuntimeError(f"pangu.train failed with exit code {done.returncode}: {said[-1]}")
        rows = read_metrics(Path(folder, "run", METRICS))
    return [row for row in rows if "step_seconds" in row]
