"""DeepSpeed against megatron-core's engine, and memory: `python -m tests.drills.zero_stages`.
With words behind it, such as `offloaded`: layouts with one of them in their names alone.

One process and two train a small model for twenty steps with each engine and ZeRO stage, offloaded
and with experts on both ranks. A table of the largest difference in loss and gradient norm,
relative to megatron-core's on one process, and of the bytes that a rank of two holds: after the
last backward pass of a step, and between steps, beside the simulator's count of weights, gradients
and optimizer. Exit code 1 if a difference is not below 1e-5.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gloo import run
from layouts import MODEL, steps

from configs.compose import load
from simulator.api import pipeline_ranks
from tests.drills.dispatchers import farthest

STEPS = 20
MOST = 1e-5
# Else stage 3 leaves weights of up to 100,000 elements whole: all of this model's.
CUT = "engine.config={zero_optimization:{stage3_param_persistence_threshold:0}}"
DS, EP2, HOST = "engine=deepspeed", "parallel.expert_model_parallel_size=2", "engine.offload=cpu"
SIZES = ["model.hidden_size=64", "model.moe_ffn_hidden_size=64", "train.micro_batch_size=2"]
LAYOUTS = {
    **{f"megatron {s}": [f"parallel.zero_stage={s}"] for s in (0, 1)},
    **{f"deepspeed {s}": [DS, f"parallel.zero_stage={s}"] for s in range(4)},
    **{f"deepspeed {s} offloaded": [DS, HOST, f"parallel.zero_stage={s}"] for s in (1, 2, 3)},
    **{f"deepspeed {s} ep2": [DS, EP2, f"parallel.zero_stage={s}"] for s in (0, 1, 2)},
    "deepspeed 3 all cut": [DS, CUT, "parallel.zero_stage=3"],
}


def all_runs(layouts: dict[str, list[str]], ranks: int) -> dict[str, tuple[Any, list[int]]]:
    """By name, the rows of all steps, and what this rank held when gradients were ready and when a
    step was over."""
    return {name: _watched([*SIZES, *line], ranks) for name, line in layouts.items()}


def _watched(overrides: list[str], ranks: int) -> tuple[Any, list[int]]:
    from pangu.engines.deepspeed.engine import DeepSpeedEngine
    from pangu.engines.megatron import engine as megatron

    held = [0, 0]

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            held[0] = _bytes() - base
            result = function(*args, **kwargs)
            held[1] = _bytes() - base
            return result

        return watched

    kept = megatron.apply_gradients, DeepSpeedEngine._apply_gradients
    gc.collect()
    base = _bytes()
    megatron.apply_gradients = before(kept[0])
    DeepSpeedEngine._apply_gradients = before(kept[1])  # type: ignore[method-assign]
    try:
        return steps(overrides, ranks, STEPS), held
    finally:
        megatron.apply_gradients, DeepSpeedEngine._apply_gradients = kept  # type: ignore[misc]


def _bytes() -> int:
    """Of all tensors of numbers that there are; rooms that ranks share are bytes, and left out."""
    storages = {}
    for each in gc.get_objects():
        kinds = torch.Tensor, torch.nn.Parameter
        if type(each) in kinds and each.is_floating_point() and each.device.type == "cpu":
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def counted(overrides: list[str]) -> int:
    """The simulator's, of a rank of two."""
    config = load([*MODEL, *SIZES, "launch.processes=2", "backend.precision=fp32", *overrides])
    (rank,) = pipeline_ranks(config)
    return int(rank.memory.kept)


def main(words: list[str]) -> int:
    reference = run(1, all_runs, {"": LAYOUTS["megatron 0"]}, 1)[0][""][0]
    worst = 0.0
    print(f"{'':24} one process  two processes  MiB: gradients ready  between steps  counted")
    for word in words or ["megatron", "deepspeed"]:
        chosen = {name: line for name, line in LAYOUTS.items() if word in name}
        alone = {name: line for name, line in chosen.items() if EP2 not in line}
        one = run(1, all_runs, alone, 1)[0] if alone else {}
        for name, (rows, held) in run(2, all_runs, chosen, 2)[0].items():
            error = farthest(rows, reference)
            errors = [farthest(one[name][0], reference), error] if name in one else [error]
            worst = max(worst, *errors)
            shown = f"{errors[0]:.1e}" if name in one else ""
            sizes = [f"{size / 2**20:.2f}" for size in (*held, counted(chosen[name]))]
            row = f"{name:24} {shown:>11}  {error:>13.1e}  {sizes[0]:>20}  {sizes[1]:>13}"
            print(f"{row}  {sizes[2]:>7}", flush=True)
    return int(not worst < MOST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
