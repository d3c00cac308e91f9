"""Every dispatcher on every layout of a small cluster: is `auto` right, and is the forecast?

    python -m pangu.calibrate --out machine.yaml --processes 4 backend=cpu backend.threads=1
    python benchmarks/dispatchers.py machine.yaml [--rate 200mbit]

Nodes are network namespaces (`tests.cluster`, which needs root) behind links of `--rate`, their
ranks processes of torchrun; what is between nodes is measured first, collective by collective, and
joins the preset as its second link. The quick start's kind of model with 64 experts, top-8,
trains on each layout with each dispatcher that can serve there, in turns. Per run: median seconds
of a step beside the simulator's, and whether it is what `moe.dispatcher=auto` takes with that
preset. A table with the date goes to `benchmarks/results/`.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SIZES = [2**exponent for exponent in (12, 20, 22, 23)]  # bytes
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
    started = [
        node.start(
            [*run, *command],
            env=cluster.environment(node) | threads,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for node in cluster.nodes
    ]
    if any(process.wait() for process in started):
        raise RuntimeError("a rank failed: " + " ".join(command))


def probe(out: Path) -> None:
    """One rank of the measurement of the link: every collective at every size."""
    import torch
    import torch.distributed as dist

    from pangu import backends
    from pangu.calibration import messages

    torch.set_num_threads(1)
    backend = backends.select("cpu", int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend.collective_library)
    samples = [messages.measure(kind, size) for kind in messages.KINDS for size in SIZES]
    if dist.get_rank() == 0:
        out.write_text(json.dumps([asdict(sample) for sample in samples]))
    dist.barrier()
    dist.destroy_process_group()


def between_nodes(rate: str) -> dict[str, Any]:
    """What two nodes of one rank reach over the link, as a preset writes a link."""
    from pangu.calibration.fit import _links
    from pangu.calibration.samples import Sample
    from tests.cluster import Cluster

    with tempfile.TemporaryDirectory() as folder, Cluster(2, rate) as cluster:
        out = Path(folder) / "samples.json"
        start(cluster, 1, [__file__, "--probe", str(out)])
        links, _ = _links([Sample(**each) for each in json.loads(out.read_text())])
    return asdict(links[0]) | {"name": "between nodes"}


def preset(machine: dict[str, Any], link: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The machine's preset for nodes of so many ranks, which share a card."""
    inside = machine["links"][0] | {"devices": ranks}
    outside = link | {"devices_per_port": ranks}
    return machine | {"devices_per_node": ranks, "links": [inside, outside]}


def measure(layout: Layout, rate: str, dispatcher: str) -> float:
    """Median seconds of a step."""
    from tests.cluster import Cluster

    with tempfile.TemporaryDirectory() as folder, Cluster(layout.nodes, rate) as cluster:
        run = Path(folder) / "run"
        overrides = [*layout.overrides, f"moe.dispatcher={dispatcher}", f"run_dir={run}"]
        start(cluster, layout.ranks, ["-m", "pangu.train", *overrides])
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
            measured[kind].append(measure(layout, rate, kind))
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


def main() -> int:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--probe"]:
        probe(Path(sys.argv[2]))
        return 0
    from tests.cluster import obstacle

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", type=Path, help="what pangu.calibrate wrote")
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if reason := obstacle():
        print(f"left out: {reason}")
        return 0
    machine, link = yaml.safe_load(options.machine.read_text()), between_nodes(options.rate)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at "
        f"the start; nodes x ranks, links of {options.rate}, of which a gather keeps "
        f"{link['bandwidth_gbps'] * link['efficiency']['all_gather'] * 8e3:.0f} Mbit/s and an "
        f"exchange {link['bandwidth_gbps'] * link['efficiency']['all_to_all'] * 8e3:.0f}; medians "
        f"of {STEPS} steps in {options.rounds} runs.",
        "",
        "| layout | dispatcher | step s | of the best | forecast s | error |",
        "|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS:
            hardware = Path(folder) / f"nodes_of_{layout.ranks}.yaml"
            hardware.write_text(yaml.safe_dump(preset(machine, link, layout.ranks)))
            rows = table(layout, hardware, options.rate, options.rounds)
            print(*rows, sep="\n", flush=True)
            lines += rows
    results = ROOT / "benchmarks" / "results"
    name = f"{time.strftime('%Y-%m-%d')}-{Path(__file__).stem}.md"
    (results / name).write_text("\n".join(["# Dispatchers over a slow link", "", *lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
