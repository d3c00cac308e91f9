"""Every dispatcher on every layout of a small cluster: is `auto` right, and is the forecast?

    python -m pangu.calibrate --out machine.yaml --processes 4 backend=cpu backend.threads=1
    python benchmarks/dispatchers.py machine.yaml [--rate 200mbit]

Nodes are network namespaces (`tests.cluster`, which needs root) behind links of `--rate`, their
ranks processes of torchrun; each layout first completes the preset by the link that it finds. A
model of the quick start's kind with 64 experts, top-8, trains on each layout with each dispatcher
that can serve there, in turns. Per dispatcher: median seconds of a step beside the simulator's, and
whether it is what `moe.dispatcher=auto` takes with that preset. A table with the date goes to
`benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WARM_UP, STEPS = 2, 6
MODEL = [
    *["model=moge_tiny", "model.num_layers=2", "model.num_experts=64", "moe.top_k=8"],
    *["model.hidden_size=512", "model.kv_channels=64", "model.moe_ffn_hidden_size=32"],
    *["model.vocab_size=512", "data=synthetic", "train.seq_length=512", "train.micro_batch_size=1"],
    *["train.global_batch_size=4", f"train.steps={WARM_UP + STEPS}", "train.validate_every=0"],
    *["checkpoint.save_at_end=false", "optimizer.warmup_steps=0"],
    *["backend=cpu", "backend.threads=1"],
]
TOP_K, MOGE = ["moe=top_k"], ["moe=moge", "moe.num_expert_groups=8"]


@dataclass(frozen=True)
class Layout:
    nodes: int
    ranks: int  # of a node
    expert_parallel: int
    router: list[str]

    def __str__(self) -> str:
        return (
            f"{self.nodes} x {self.ranks}, EP {self.expert_parallel}, "
            f"{self.router[0].removeprefix('moe=')}"
        )

    @property
    def overrides(self) -> list[str]:
        return [
            *MODEL,
            *self.router,
            f"parallel.expert_model_parallel_size={self.expert_parallel}",
            f"launch.nodes={self.nodes}",
            f"launch.processes={self.ranks}",
        ]


LAYOUTS = (
    Layout(2, 2, 4, TOP_K),
    Layout(2, 2, 4, MOGE),
    Layout(2, 1, 2, TOP_K),
    Layout(4, 1, 4, MOGE),
)


def start(cluster: Any, ranks: int, command: list[str]) -> None:
    """`command` under torchrun on every node, to its end."""
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    threads = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if any(cluster.run([*run, *command], threads, **silent)):
        raise RuntimeError("a rank failed: " + " ".join(command))


def calibrated(machine: Path, nodes: int, ranks: int, rate: str, out: Path) -> None:
    """The machine's preset with what `nodes` of so many ranks find between them."""
    from tests.cluster import Cluster

    command = ["-m", "pangu.calibrate", "--machine", str(machine), "--out", str(out)]
    with Cluster(nodes, rate) as cluster:
        start(cluster, ranks, [*command, "backend=cpu", "backend.threads=1"])


def measure(nodes: int, ranks: int, rate: str, overrides: list[str]) -> float:
    """Median seconds of a step of a run on so many nodes of so many ranks."""
    from tests.cluster import Cluster

    with tempfile.TemporaryDirectory() as folder, Cluster(nodes, rate) as cluster:
        run = Path(folder) / "run"
        start(cluster, ranks, ["-m", "pangu.train", *overrides, f"run_dir={run}"])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step_seconds"] for row in rows if "step_seconds" in row]
    return statistics.median(steps[WARM_UP:])


def table(layout: Layout, machine: Path, rate: str, rounds: int) -> list[str]:
    """Markdown rows of one layout, fastest first."""
    from configs.compose import load
    from configs.dispatch import durations, links, resolved
    from simulator.predict import predict

    hardware = f"hardware={machine}"
    chosen = load([*layout.overrides, hardware, "moe.dispatcher=auto"])
    auto = resolved(chosen)
    kinds = list(durations(chosen.moe, layout.expert_parallel, 1, links(chosen)))
    measured: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            overrides = [*layout.overrides, f"moe.dispatcher={kind}"]
            measured[kind].append(measure(layout.nodes, layout.ranks, rate, overrides))
    found = {kind: statistics.median(seconds) for kind, seconds in measured.items()}
    best = min(found.values())
    rows = []
    for kind in sorted(found, key=lambda kind: found[kind]):
        forecast = predict(load([*layout.overrides, hardware, f"moe.dispatcher={kind}"]))
        error = forecast.step_seconds / found[kind] - 1
        rows.append(
            f"| {layout} | {kind}{', auto' if kind == auto else ''} | {found[kind]:.2f} | "
            f"{found[kind] / best:.2f} | {forecast.step_seconds:.2f} | {error:+.0%} |"
        )
    return rows


def keep(script: str, title: str, lines: list[str]) -> None:
    """The table of a benchmark, under its name and today's date."""
    name = f"{time.strftime('%Y-%m-%d')}-{Path(script).stem}.md"
    (ROOT / "benchmarks" / "results" / name).write_text("\n".join([f"# {title}", "", *lines, ""]))


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from tests.cluster import obstacle

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", type=Path, help="what pangu.calibrate wrote")
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if reason := obstacle():
        print(f"left out: {reason}")
        return 0
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at "
        f"the start; nodes x ranks, links of {options.rate}; medians of {STEPS} steps, and of "
        f"{options.rounds} runs.",
        "",
        "| layout | dispatcher | step s | of the best | forecast s | error |",
        "|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS:
            hardware = Path(folder) / f"{layout.nodes}x{layout.ranks}.yaml"
            if not hardware.exists():
                sizes = layout.nodes, layout.ranks
                calibrated(options.machine, *sizes, options.rate, hardware)
            rows = table(layout, hardware, options.rate, options.rounds)
            print(*rows, sep="\n", flush=True)
            lines += rows
    keep(__file__, "Dispatchers over a slow link", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
