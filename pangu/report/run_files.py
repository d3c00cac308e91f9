"""The files of a run folder that a report reads: numbers only, without torch."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pangu.plain_file import read_plain

Row = dict[str, Any]

METRICS = "metrics.jsonl"
EXPERT_LOAD = "expert_load.json"
BASELINES = "baselines.json"
CONFIG = "config.yaml"
SAMPLE = "sample.txt"
_WORDS = ("beside", "checkpoint_error")


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`, of which the last line may be unfinished; [] without one."""
    return parse_rows(read_plain(path)) if path.is_file() else []


def parse_rows(text: bytes) -> list[Row]:
    """What is a row of a run: a JSON object with a step. Lines that are none are left out."""
    rows = []
    for line in text.decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # written to when it was killed, or damaged
            continue
        if isinstance(row, dict) and type(step := row.get("step")) is int and 0 <= step < 1 << 53:
            rows.append(row)
    return rows


def numbers(row: Row) -> Row:
    """A row without what cannot be drawn: None in the place of anything but finite numbers, and
    of words but where a word belongs."""

    def sound(name: str, value: Any) -> bool:
        if name in _WORDS:
            return isinstance(value, str)
        return type(value) in (int, float) and abs(value) < 1e300

    return {name: value if sound(name, value) else None for name, value in row.items()}


@dataclass(frozen=True)
class ExpertLoad:
    """How often every expert was chosen in steps `first_step` to `last_step`.

    `counts[n]` are the choices of the experts of layer n (from 1). `num_groups` is 1 unless the
    router is MoGE. `biases[n]` are the balancing biases at `last_step`, in units of the router's
    scores; {} where nothing balances by bias.
    """

    first_step: int
    last_step: int
    num_groups: int
    counts: dict[int, list[int]]
    biases: dict[int, list[float]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        replace_text(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> ExpertLoad | None:
        """What `write` wrote; None without a file (a dense model)."""
        if not path.is_file():
            return None
        data = json.loads(path.read_text())
        for name in ("counts", "biases"):
            data[name] = {int(layer): values for layer, values in data.get(name, {}).items()}
            if np.array(list(data[name].values()), dtype=np.float64).ndim != 2 and data[name]:
                raise ValueError(f"{name} is no table")
        return cls(**data)

    def relative(self) -> np.ndarray:
        """`[layers, experts]`: choices over those of an even spread; 1 is balance."""
        counts = np.array(list(self.counts.values()), dtype=np.float64)
        return counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-12)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def perplexity(loss: float) -> str:
    """e^loss as people read it: three digits, or one decimal above a hundred."""
    value = math.exp(min(loss, 700.0))
    return f"{value:,.1f}" if value >= 100 else f"{value:#.3g}"


def short(number: float) -> str:
    """A count with three digits and a letter: 6.55M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"
