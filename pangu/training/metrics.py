"""Numbers of a run, one JSON object per line in `<run_dir>/metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends to `metrics.jsonl`; only rank 0 has a file."""

    def __init__(self, run_dir: Path, active: bool) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.active = active
        if active:
            run_dir.mkdir(parents=True, exist_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it is on disk when the call returns."""
        if self.active:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
