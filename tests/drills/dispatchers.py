"""Every dispatcher against one process: `python -m tests.drills.dispatchers`.

Four processes, as two nodes of two, train a small model for twenty steps with each dispatcher, both
kinds of router, and with and without recomputation; every value of each axis meets every value of
another. A table of the largest difference in loss and gradient norm, relative to one process's;
exit code 1 if one is not below 1e-5.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gloo import run
from layouts import all_layouts

STEPS = 20
MOST = 1e-5
SIZES = ["moe.top_k=4", "moe.num_expert_groups=4"]
TWO_NODES = ["launch.processes=2", "launch.nodes=2"]
EP4 = [*TWO_NODES, "parallel.expert_model_parallel_size=4"]
TP2 = "parallel.tensor_model_parallel_size=2"
EP2_TP2 = [*TWO_NODES, "parallel.expert_model_parallel_size=2", TP2]
LAYER = ["memory=selective", "memory.recompute_modules=[moe]"]
PARTS = ["memory=selective", "memory.recompute_modules=[moe_act,core_attn,layernorm]"]
ALL = ["memory=full"]
LAYOUTS = {
    "moge": {
        "hierarchical": [*EP4],
        "hierarchical, recomputed": [*EP4, *LAYER],
        "deduplicated, recomputed": [*EP4, *ALL],
        "deduplicated, sliced experts": [*EP2_TP2, "parallel.expert_tensor_parallel_size=2"],
        "alltoall": [*EP4],
        "allgather, recomputed": [*EP4, *PARTS],
        "moge": [*EP4],
        "moge, recomputed": [*EP2_TP2, *LAYER],
    },
    "top_k": {
        "hierarchical": [*EP4, *ALL],
        "hierarchical, tensor parallel": [*EP4, TP2],
        "hierarchical, one node": [*EP2_TP2],
        "deduplicated": [*EP4],
        "deduplicated, recomputed": [*EP2_TP2, *LAYER],
        "alltoall, recomputed": [*EP4, *LAYER],
        "allgather": [*EP4],
    },
}


def errors(router: str, names: list[str]) -> dict[str, float]:
    """Of each layout named, the largest difference from one process."""
    moe = [f"moe={router}", *SIZES]
    expected = run(1, all_layouts, {"single": moe}, 1, STEPS)[0]["single"]
    four = {
        name: [*moe, *LAYOUTS[router][name], f"moe.dispatcher={name.split(',')[0]}"]
        for name in names
    }
    found = run(4, all_layouts, four, 4, STEPS)[0]
    return {name: farthest(values, expected) for name, values in found.items()}


def farthest(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    """The largest relative difference of a loss or gradient norm."""
    return max(
        abs(a - b) / abs(b)
        for x, y in zip(found, expected, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def main() -> int:
    worst = 0.0
    for router, layouts in LAYOUTS.items():
        for name, error in errors(router, list(layouts)).items():
            print(f"{router:6} {name:32} {error:.1e}", flush=True)
            worst = max(worst, error)
    return int(not worst < MOST)


if __name__ == "__main__":
    sys.exit(main())
