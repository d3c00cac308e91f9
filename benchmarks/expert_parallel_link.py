"""An MoE layer whose experts lie on two nodes, over a slow link: MoGE's dispatch beside top-k's.

    python benchmarks/expert_parallel_link.py

Two nodes are two network namespaces (`tests.cluster`, which needs root) with a rank each, started
by torchrun; expert parallelism 2 crosses the link. Forward and backward of one layer, float32.
Variants take turns in one run; per variant: bytes that a node sends, those that its formula gives,
and seconds of the slower rank, medians over rounds. Formulas count values from the choices that the
routers really made (per rank and step; T tokens, H hidden, X experts of
a rank, K choices, J = K/2):

  moge          4·T·H + 4·T·J                       all-gather and reduce-scatter, both ways
  allgather     4·T·H + 2·T·X
  alltoall      (2·H + 1)·(rows sent + rows received)
  deduplicated  2·H·(tokens sent + received) + 2·(choices sent + received)

A table with the date goes to `benchmarks/results/`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
RATES = ("1gbit", "200mbit")
ROUNDS = 5
VARIANTS = (
    ("moge", "moge"),
    ("moge", "deduplicated"),
    ("moge", "alltoall"),
    ("top_k", "allgather"),
    ("top_k", "deduplicated"),
    ("top_k", "alltoall"),
)
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


@dataclass(frozen=True)
class Shape:
    """`tokens` a rank of `hidden` width through `top_k` of `experts` experts of `width`."""

    tokens: int = 2048
    hidden: int = 512
    width: int = 128
    experts: int = 64
    top_k: int = 8

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens a rank, hidden {self.hidden}, {self.experts} experts of width "
            f"{self.width}, top-{self.top_k}"
        )


def build(shape: Shape, router: str, dispatcher: str) -> torch.nn.Module:
    """The layer with this rank's half of the experts, from the same seed on every rank."""
    from megatron.core.transformer.spec_utils import build_module

    from configs.compose import load
    from pangu.model.transformer_config import transformer_config
    from pangu.moe.layer import moe_layer_spec

    groups = ["moe.num_expert_groups=" + str(shape.top_k)] if router == "moge" else []
    config = load(
        [
            *("model=moge_tiny", "model.num_layers=1", f"model.hidden_size={shape.hidden}"),
            *(f"model.num_experts={shape.experts}", f"model.moe_ffn_hidden_size={shape.width}"),
            *("model.shared_expert_ffn_hidden_size=0", f"moe={router}", *groups),
            *(f"moe.top_k={shape.top_k}", f"moe.dispatcher={dispatcher}", "backend=cpu"),
            *("parallel.expert_model_parallel_size=2", "launch.processes=2"),
        ]
    )
    settings = transformer_config(config)
    layer = build_module(moe_layer_spec(settings), config=settings)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return layer.train()


def formula(shape: Shape, dispatcher: str, routing_map: torch.Tensor, rank: int) -> float:
    """Bytes that this rank sends in a step; the map is `[T, E]`, its own."""
    tokens, hidden = shape.tokens, shape.hidden
    if dispatcher == "moge":
        return 4 * (4 * tokens * hidden + 4 * tokens * shape.top_k // 2)
    if dispatcher == "allgather":
        return 4 * (4 * tokens * hidden + 2 * tokens * shape.experts // 2)
    away = routing_map.unflatten(-1, (2, -1))[:, 1 - rank]
    sent = torch.tensor([away.any(dim=-1).sum(), away.sum()])
    dist.all_reduce(both := sent.clone())  # what one sends the other receives
    rows, choices = both.tolist()
    if dispatcher == "alltoall":
        return 4 * (2 * hidden + 1) * choices
    return 4 * (2 * hidden * rows + 2 * choices)


def together() -> None:
    """All have come here, and nothing is under way any more."""
    dist.barrier()
    time.sleep(0.1)
    dist.barrier()


def work(shape: Shape, rounds: int, variants: Sequence[Sequence[str]], folder: Path) -> None:
    """One rank: `{variant: {bytes, formula, seconds: [...]}}` into a file of its own."""
    import warnings

    from configs.compose import load
    from pangu.engines.megatron import process_groups
    from pangu.engines.megatron.fitting import select_backend

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    select_backend("cpu")
    process_groups.initialize(
        load(["backend=cpu", "parallel.expert_model_parallel_size=2", "launch.processes=2"])
    )
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(shape.tokens, 1, shape.hidden, generator=generator).requires_grad_()
    layers = [build(shape, router, dispatcher) for router, dispatcher in variants]
    found = []
    for (_, dispatcher), layer in zip(variants, layers, strict=True):
        with torch.no_grad():
            _, routing_map = layer.router(x)
        found.append({"formula": formula(shape, dispatcher, routing_map, rank), "seconds": []})
    for turn in range(rounds + 1):  # the first one connects and warms up
        for layer, row in zip(layers, found, strict=True):
            together()
            before = int(SENT.read_text())
            together()
            started = time.perf_counter()
            output = layer(x)
            output = output[0] if isinstance(output, tuple) else output
            output.backward(torch.ones_like(output))
            seconds = time.perf_counter() - started
            together()
            row["bytes"] = int(SENT.read_text()) - before
            row["seconds"] += [seconds] if turn else []
    (folder / f"{rank}.json").write_text(json.dumps(found))
    process_groups.shutdown()


def measure(
    rate: str | None,
    shape: Shape,
    rounds: int,
    variants: Sequence[Sequence[str]] = VARIANTS,
) -> list[list[dict]]:
    """What `work` found on both ranks, on nodes with links of `rate`."""
    sys.path.insert(0, str(ROOT))
    from tests.cluster import Cluster

    with tempfile.TemporaryDirectory() as folder, Cluster(2, rate) as cluster:
        job = json.dumps([asdict(shape), rounds, variants, folder])
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", __file__]
        threads = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if any(cluster.run([*command, "--worker", job], threads)):
            raise RuntimeError("a rank failed with its message above")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]


def table(rate: str, ranks: Sequence[Sequence[dict]]) -> list[str]:
    """Markdown rows of one rate."""
    rows = []
    for (router, dispatcher), *sides in zip(VARIANTS, *ranks, strict=True):
        seconds = statistics.median(map(max, zip(*(s["seconds"] for s in sides), strict=True)))
        sent = max(side["bytes"] for side in sides) / 1e6
        expected = max(side["formula"] for side in sides) / 1e6
        rows.append((router, dispatcher, sent, expected, seconds))
    best = rows[0][-1]
    return [
        f"| {rate} | {router} | {dispatcher} | {sent:.2f} | {expected:.2f} | {seconds:.3f} | "
        f"{seconds / best:.2f} |"
        for router, dispatcher, sent, expected, seconds in rows
    ]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        shape, rounds, variants, folder = json.loads(sys.argv[2])
        work(Shape(**shape), rounds, variants, Path(folder))
        return
    sys.path.insert(0, str(ROOT))
    from tests.cluster import obstacle

    if reason := obstacle():
        print(f"left out: {reason}")
        return
    shape = Shape()
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at "
        f"the start; one MoE layer, forward and backward, {shape}; two nodes of one rank.",
        "",
        "| link | router | dispatcher | MB sent by a node | MB by formula | seconds | of MoGE's |",
        "|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n")
    for rate in RATES:
        rows = table(rate, measure(rate, shape, ROUNDS))
        print(*rows, sep="\n", flush=True)
        lines += rows
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    name = f"{time.strftime('%Y-%m-%d')}-{Path(__file__).stem}.md"
    (results / name).write_text("\n".join(["# Expert parallelism across a link", "", *lines, ""]))


if __name__ == "__main__":
    main()
