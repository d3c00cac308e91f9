"""Published peaks of speculative decoding: MoESD (arXiv 2505.19645), tables 1 and 2, Qwen2.

Qwen2-57B-A14B with Qwen2-0.5B drafting, vLLM, 19 batches from 1 to 100. The paper gives σ and the
peak of each cell, not at which batch, and neither lengths of the outputs: prompts had 38 to 391
tokens on HumanEval and 5 to 356 on MT-bench.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from configs.compose import load
from simulator.hardware import load_hardware
from simulator.serving import Serving, serving
from simulator.speculation import speculate

TABLE = Path(__file__).with_name("speculation.csv")
BATCHES = np.array([1, 2, *range(4, 61, 4), 80, 100])
# What vLLM spends on each pass beside the device's time: fitted to the twelve peaks of 4 A800.
HOST_MS = 6.5


@dataclass(frozen=True)
class Peak:
    """A published peak and ours: `batch` is where ours lies."""

    hardware: str
    devices: int
    dataset: str
    temperature: float
    draft_tokens: int
    sigma: float
    published: float
    predicted: float
    batch: int

    @property
    def error(self) -> float:
        """Relative, of ours."""
        return self.predicted / self.published - 1.0

    @property
    def calibrated(self) -> bool:
        """Whether `HOST_MS` was fitted to this one among others."""
        return (self.hardware, self.devices) == ("a800", 4)


def published_peaks(host_ms: float = HOST_MS) -> list[Peak]:
    """Every published peak beside ours."""
    with TABLE.open(encoding="utf-8", newline="") as lines:
        return [_peak(row, host_ms) for row in csv.DictReader(lines)]


def _peak(row: dict[str, str], host_ms: float) -> Peak:
    length, sigma = int(row["draft_tokens"]), float(row["sigma"])
    layout = _layout(row["hardware"], row["devices"], host_ms)
    times = replace(speculate(layout, BATCHES, length), sigma=sigma)
    speedup = np.asarray(times.speedup)
    best = int(np.argmax(speedup))
    return Peak(
        row["hardware"],
        int(row["devices"]),
        row["dataset"],
        float(row["temperature"]),
        length,
        sigma,
        float(row["speedup"]),
        float(speedup[best]),
        int(BATCHES[best]),
    )


@cache
def _layout(hardware: str, devices: str, host_ms: float) -> Serving:
    config = load(
        [
            "model=qwen2_57b_a14b",
            "inference.draft=qwen2_0_5b",
            f"hardware={hardware}",
            f"devices={devices}",
            f"parallel.tensor_model_parallel_size={devices}",
            f"parallel.expert_tensor_parallel_size={devices}",
            "inference.prompt_length=150",
            "inference.max_new_tokens=400",
            f"inference.host_ms={host_ms}",
        ]
    )
    return serving(config, load_hardware(config.hardware))
