"""MoGE against plain top-k: equal size, data and steps, three seeds each, at quick-start scale.

Runs a sweep through `pangu.train -m` (two processes, expert parallelism 2; an interrupted sweep
continues) and prints held-out loss and both imbalances, mean and spread over the seeds. Extra
overrides may follow: `python benchmarks/routing_quality.py train.steps=300`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROUTERS, SEEDS = ("moge", "top_k"), (1, 2, 3)
FOLDER = Path("runs/routing_quality")
LAST_STEPS = 100  # imbalance is the mean over so many steps at the end


def results(folder: Path) -> dict[str, float]:
    """Held-out loss at the end of a run, and its mean imbalances."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    steps = [row for row in rows if "loss" in row][-LAST_STEPS:]
    return {
        "held-out loss": [r["validation_loss"] for r in rows if "validation_loss" in r][-1],
        "device imbalance": statistics.mean(row["device_imbalance"] for row in steps),
        "expert imbalance": statistics.mean(row["expert_imbalance"] for row in steps),
    }


def main(overrides: list[str]) -> None:
    """Run what is missing, then print the table."""
    sweep = [f"moe={','.join(ROUTERS)}", f"seed={','.join(map(str, SEEDS))}"]
    command = [sys.executable, "-m", "pangu.train", "-m", "experiment=quickstart", *sweep]
    command += [f"run_dir={FOLDER}", "checkpoint.save_every=0", *overrides]
    subprocess.run(command, check=True)
    print(f"{'':8}{'held-out loss':>22}{'device imbalance':>22}{'expert imbalance':>22}")
    for router in ROUTERS:
        runs = [results(FOLDER / f"moe={router},seed={seed}") for seed in SEEDS]
        cells = []
        for key in runs[0]:
            values = [run[key] for run in runs]
            cells.append(f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}")
        print(f"{router:8}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main(sys.argv[1:])
