"""MoGE against plain top-k at quick-start scale, and what could close the gap at perfect balance.

Every variant is a sweep over seeds through `pangu.train -m` (two processes, expert parallelism 2;
an interrupted sweep continues where it stopped): equal steps, tokens and active parameters. Prints
held-out loss and both imbalances, mean and spread over the seeds, best first.

    python benchmarks/routing_quality.py train.steps=400             # moge and top_k, three seeds
    python benchmarks/routing_quality.py --all train.steps=400       # every variant, two seeds
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

SIGMOID = ["moe.score_function=sigmoid", "moe.renormalize=true"]
BIAS = ["moe.expert_bias=true", "moe.aux_loss_coefficient=0"]
FINE = ["model.num_experts=32", "model.moe_ffn_hidden_size=32", "moe.top_k=8"]
PAIR = {"moge": ["moe=moge"], "top_k": ["moe=top_k"]}
VARIANTS: dict[str, list[str]] = PAIR | {
    "top_k, bias_balanced": ["moe=bias_balanced"],
    "moge, alpha 0": ["moe=moge", "moe.aux_loss_coefficient=0"],
    "moge, alpha 1e-3": ["moe=moge", "moe.aux_loss_coefficient=1e-3"],
    "moge, global_batch": ["moe=moge", "moe.aux_loss_scope=global_batch"],
    "moge, renormalized": ["moe=moge", "moe.renormalize=true"],
    "moge, router_scale": ["moe=moge", "moe.router_scale=true"],
    "moge, scaled by 2": ["moe=moge", "moe.scaling_factor=2"],
    "moge, sigmoid": ["moe=moge", *SIGMOID],
    "moge, sigmoid, bias": ["moe=moge", *SIGMOID, *BIAS],
    "moge, 2 groups": ["moe=moge", "moe.num_expert_groups=2"],
    "moge, 2 groups, renormalized": ["moe=moge", "moe.num_expert_groups=2", "moe.renormalize=true"],
    "moge, 2 groups, sigmoid": ["moe=moge", "moe.num_expert_groups=2", *SIGMOID],
    "moge, 2 groups, sigmoid, bias": ["moe=moge", "moe.num_expert_groups=2", *SIGMOID, *BIAS],
    "32 experts: top_k": ["moe=top_k", *FINE],
    "32 experts: moge, 8 groups": ["moe=moge", *FINE, "moe.num_expert_groups=8"],
    "32 experts: moge, 4 groups": ["moe=moge", *FINE, "moe.num_expert_groups=4"],
    "32 experts: moge, 4 groups, sigmoid": [
        *["moe=moge", *FINE, "moe.num_expert_groups=4"],
        *SIGMOID,
    ],
}
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


def folder_of(variant: str) -> Path:
    return FOLDER / variant.replace(", ", "-").replace(": ", "-").replace(" ", "_")


def train(variant: str, seeds: range, overrides: list[str]) -> list[dict[str, float]]:
    """The results of a variant's runs, those that are missing run first."""
    command = [sys.executable, "-m", "pangu.train", "-m", "experiment=quickstart"]
    command += [*VARIANTS[variant], f"seed={','.join(map(str, seeds))}", "checkpoint.save_every=0"]
    subprocess.run([*command, f"run_dir={folder_of(variant)}", *overrides], check=True)
    return [results(folder_of(variant) / f"seed={seed}") for seed in seeds]


def main(arguments: list[str]) -> None:
    """Run what is missing, then print the table."""
    variants, seeds = (VARIANTS, range(1, 3)) if "--all" in arguments else (PAIR, range(1, 4))
    overrides = [argument for argument in arguments if argument != "--all"]
    runs = {variant: train(variant, seeds, overrides) for variant in variants}
    rows = sorted(runs, key=lambda name: statistics.mean(r["held-out loss"] for r in runs[name]))
    print("| router | held-out loss | device imbalance | expert imbalance |\n|---|---|---|---|")
    for variant in rows:
        cells = []
        for key in runs[variant][0]:
            values = [run[key] for run in runs[variant]]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        print(f"| {variant} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
