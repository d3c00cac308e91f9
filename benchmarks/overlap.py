"""Experts over a slow link: a layer's tokens in chunks, two micro-batches at once, both, neither.

    python benchmarks/overlap.py [--rate 100mbit] [--width 1024] [--chunks 4] [--rounds 2]

Two nodes of one rank (`tests.cluster`, which needs root) train a model of the quick start's kind
with expert parallelism 2, MoGE's dispatch and top-k's all-to-all; the four ways take turns. Per
run, of the steps traced, means of the ranks: seconds of a step, beside the same round's without
overlap; of the experts' communication and of computing; and the part of the communication during
which the same rank computes, of all of it, of computing, and, for micro-batches side by side, of
what has computing to hide behind: of m micro-batches m - 1 have another's pass beside them, and no
more of their messages can be hidden than there is computing. A table with the date goes to
`benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = (3, 4, 5)
MICRO_BATCHES = 8
MODEL = [
    *["model.num_layers=4", "model.hidden_size=256", "model.kv_channels=64"],
    "model.shared_expert_ffn_hidden_size=256",
    *["model.vocab_size=512", "data=synthetic", "train.seq_length=512", "backend=cpu"],
    *["backend.threads=1", "parallel.expert_model_parallel_size=2", "train.micro_batch_size=1"],
    *[f"train.global_batch_size={2 * MICRO_BATCHES}", f"train.steps={STEPS[-1]}"],
    *["train.validate_every=0", "checkpoint.save_at_end=false", "optimizer.warmup_steps=0"],
    f"profile.steps=[{','.join(map(str, STEPS))}]",
]
VARIANTS = {
    "moge": ["moe=moge", "moe.dispatcher=moge"],
    "top_k": ["moe=top_k", "moe.dispatcher=alltoall"],
}
BESIDE = "parallel.overlap_expert_parallel=true"


@dataclass(frozen=True)
class Found:
    """Seconds per step, means of the ranks."""

    step: float
    talking: float
    computing: float
    hidden: float

    @property
    def of_all(self) -> float:
        return self.hidden / self.talking

    @property
    def of_computing(self) -> float:
        return self.hidden / self.computing

    @property
    def of_what_can_be(self) -> float:
        paired = (MICRO_BATCHES - 1) / MICRO_BATCHES
        return self.hidden / (paired * min(self.talking, self.computing))


def run(rate: str, overrides: list[str]) -> Found:
    """Train on both nodes, and read what rank 0 wrote."""
    from tests.cluster import Cluster

    with tempfile.TemporaryDirectory() as folder, Cluster(2, rate) as cluster:
        command = [sys.executable, "-m", "pangu.train", *MODEL, *overrides]
        threads = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command += [f"run_dir={folder}/run"]
        if any(cluster.run(command, threads, stdout=subprocess.DEVNULL)):
            raise RuntimeError("a rank failed with its message above")
        return read(Path(folder) / "run")


def read(run_dir: Path) -> Found:
    from pangu.backends.timeline import COMPUTE, LANES, Span
    from pangu.training.profile import hidden

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    step = sum(row["step_seconds"] for row in rows if row["step"] in STEPS) / len(STEPS)
    ranks: list[list[Span]] = [[], []]
    for event in json.loads((run_dir / "trace.json").read_text())["traceEvents"]:
        if event["ph"] == "X":
            start, length = int(event["ts"] * 1000), int(event["dur"] * 1000)
            group = event["args"].get("group", "")
            lane = LANES[event["tid"]]
            ranks[event["pid"]].append(Span(lane, event["name"], start, start + length, group))
    experts = hidden(ranks)["communication of experts"]
    work = sum(span.end - span.start for each in ranks for span in each if span.lane == COMPUTE)
    count = len(STEPS)
    computing = work / 1e9 / len(ranks) / count
    return Found(step, experts.lasting / count, computing, experts.hidden / count)


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from tests.cluster import obstacle

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--width", type=int, default=1024, help="of an expert")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if reason := obstacle():
        print(f"left out: {reason}")
        return 0
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at "
        f"the start; two nodes of one rank, link of {options.rate}, experts {options.width} wide, "
        f"{MICRO_BATCHES} micro-batches of 512 tokens, {options.chunks} chunks; seconds per step.",
        "",
        "| router | beside each other | step | of none's | experts' messages | computing | hidden "
        "| of computing | of what can be |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    for name, overrides in VARIANTS.items():
        for _ in range(options.rounds):
            for row in rows(options, name, overrides):
                lines.append(row)
                print(row, flush=True)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    what = f"{Path(__file__).stem}-{options.rate}-{options.width}"
    title = "# Chunks of a layer, and two micro-batches at once"
    path = results / f"{time.strftime('%Y-%m-%d')}-{what}.md"
    path.write_text("\n".join([title, "", *lines, ""]))
    return 0


def rows(options: argparse.Namespace, router: str, overrides: list[str]) -> Iterator[str]:
    """One of every way, in turn."""
    chunks = f"moe.dispatch_chunks={options.chunks}"
    ways = {"none": [], "chunks": [chunks], "micro-batches": [BESIDE], "both": [BESIDE, chunks]}
    width, alone = f"model.moe_ffn_hidden_size={options.width}", 0.0
    for way, more in ways.items():
        found = run(options.rate, [*overrides, width, *more])
        alone = alone or found.step
        row = f"| {router} | {way} | {found.step:.2f} | {found.step / alone:.2f} | "
        row += f"{found.talking:.2f} | {found.computing:.2f} | {found.of_all:.0%} | "
        row += f"{found.of_computing:.0%} | "
        yield row + (f"{found.of_what_can_be:.0%} |" if BESIDE in more else "|")


if __name__ == "__main__":
    sys.exit(main())
