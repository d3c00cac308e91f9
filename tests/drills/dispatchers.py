"""Every dispatcher against one process: `python -m tests.drills.dispatchers`.

Four processes, as two nodes of two, train a small model for twenty steps with each dispatcher, both
kinds of router, with and without overlap, recomputation, swap, experts that move, and chunks; every
value of each axis meets every value of another. A table of the largest difference in loss and
gradient norm, relative to one process's; exit code 1 if one is not below 1e-5.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gloo import run
from layouts import all_layouts

STEPS = 20
MOST = 1e-5
ROUTERS = {
    "top_k": ["moe=top_k", "moe.top_k=4"],
    "moge": ["moe=moge", "moe.top_k=4", "moe.num_expert_groups=4"],
    # Two ranks share a group, so that its experts have somewhere to go.
    "moge, wide": ["moe=moge", "moe.top_k=4", "moe.num_expert_groups=2"],
}
EP4 = "parallel.expert_model_parallel_size=4"
EP2 = "parallel.expert_model_parallel_size=2"
EP2_TP2 = [EP2, "parallel.tensor_model_parallel_size=2"]
EP2_PP2 = [EP2, "parallel.pipeline_model_parallel_size=2"]
LAYOUTS = {
    "EP4": [EP4],
    "EP4 TP2": [EP4, "parallel.tensor_model_parallel_size=2"],
    "EP2 TP2": EP2_TP2,
    "EP2 TP2 ETP2": [*EP2_TP2, "parallel.expert_tensor_parallel_size=2"],
    "EP2 PP2": EP2_PP2,
    "EP2 PP2 VPP2": [*EP2_PP2, "parallel.virtual_pipeline_model_parallel_size=2"],
}
MEMORY = {
    "none": [],
    "full": ["memory=full"],
    "layer": ["memory=selective", "memory.recompute_modules=[moe]"],
    "parts": ["memory=selective", "memory.recompute_modules=[moe_act,core_attn,layernorm]"],
    "swap": ["memory.swap=[core_attn,mlp,moe]", "train.seq_length=128"],
}
PLACEMENT = {
    "static": [],
    "dynamic": [
        *["moe.placement=dynamic", "moe.placement_period=3", "moe.placement_threshold=0"],
    ],
}


@dataclass(frozen=True)
class Way:
    """One row of the table: its axes, by the names above."""

    dispatcher: str
    router: str
    overlap: bool
    memory: str
    placement: str
    layout: str = "EP4"
    chunks: int = 1

    @property
    def model(self) -> list[str]:
        """What one process must be told, too."""
        return [*ROUTERS[self.router], *(MEMORY["swap"][1:] if self.memory == "swap" else [])]

    @property
    def overrides(self) -> list[str]:
        nodes = ["launch.processes=2", "launch.nodes=2", f"moe.dispatcher={self.dispatcher}"]
        overlap = [f"parallel.overlap_expert_parallel={str(self.overlap).lower()}"]
        rest = [*MEMORY[self.memory], *PLACEMENT[self.placement], *LAYOUTS[self.layout]]
        return [*self.model, *nodes, *overlap, *rest, f"moe.dispatch_chunks={self.chunks}"]

    def axes(self) -> tuple[object, ...]:
        """The six axes' values; the ways to recompute are one, and those to group, and to cut."""
        kinds = {"full": "recompute", "layer": "recompute", "parts": "recompute"}
        memory, router = kinds.get(self.memory, self.memory), self.router.split(",")[0]
        return self.dispatcher, router, self.overlap, memory, self.placement, self.chunks > 1

    def __str__(self) -> str:
        return ", ".join(str(getattr(self, field.name)) for field in fields(self))


WAYS = [
    Way("hierarchical", "moge", False, "none", "static"),
    Way("hierarchical", "top_k", True, "layer", "dynamic", "EP4 TP2", 3),
    Way("hierarchical", "moge", True, "swap", "static"),
    Way("hierarchical", "top_k", False, "full", "static", "EP2 TP2"),
    Way("deduplicated", "top_k", True, "none", "dynamic", chunks=2),
    Way("deduplicated", "moge", False, "full", "static", "EP2 TP2 ETP2"),
    Way("deduplicated", "top_k", False, "swap", "dynamic", "EP2 PP2"),
    Way("alltoall", "top_k", True, "none", "static"),
    Way("alltoall", "moge, wide", False, "layer", "dynamic"),
    Way("alltoall", "top_k", True, "swap", "dynamic", "EP2 PP2 VPP2", 3),
    Way("allgather", "moge, wide", False, "none", "dynamic", chunks=4),
    Way("allgather", "top_k", True, "parts", "static"),
    Way("allgather", "top_k", False, "swap", "static"),
    Way("moge", "moge", False, "none", "dynamic"),  # whole groups on each rank: none moves
    Way("moge", "moge", True, "layer", "static", "EP2 TP2", 4),
    Way("moge", "moge", True, "swap", "dynamic"),
]


def pairs_left_out() -> set[tuple[object, ...]]:
    """Pairs of values of two axes that no way has; MoGE's dispatcher serves its router alone."""
    axes = list(zip(*(way.axes() for way in WAYS), strict=True))
    left_out: set[tuple[object, ...]] = set()
    for one, two in combinations(axes, 2):
        wanted = {(a, b) for a in one for b in two}
        left_out |= wanted - set(zip(one, two, strict=True))
    return left_out - {("moge", "top_k")}


def errors(ways: list[Way]) -> dict[Way, float]:
    """Of each way, the largest difference from one process."""
    models = {" ".join(way.model): way.model for way in ways}
    expected = run(1, all_layouts, models, 1, STEPS)[0]
    found = run(4, all_layouts, {str(way): way.overrides for way in ways}, 4, STEPS)[0]
    return {way: farthest(found[str(way)], expected[" ".join(way.model)]) for way in ways}


def farthest(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    """The largest relative difference of a loss or gradient norm."""
    return max(
        abs(a - b) / abs(b)
        for x, y in zip(found, expected, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def main() -> int:
    worst = 0.0
    columns = "dispatcher, router, overlap, memory, placement, layout, chunks"
    print(f"{columns:64} largest difference")
    for way, error in errors(WAYS).items():
        print(f"{way!s:64} {error:.1e}", flush=True)
        worst = max(worst, error)
    return int(not worst < MOST)


if __name__ == "__main__":
    sys.exit(main())
