"""Resume: to the last bit in the same layout, along the same curve in any other."""

from pathlib import Path

import pytest
import torch
from checkpoint_runs import Steps, copy, train
from gloo import run

from pangu.report.run_files import METRICS, read_metrics

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"
ETP2 = "parallel.expert_tensor_parallel_size=2"
ZERO0 = "parallel.zero_stage=0"
BF16 = "backend.precision=bf16"
PHASES = (
    "optimizer.phases=["
    "{name: first, steps: 3, lr: 1e-3, min_lr: 1e-3, schedule: constant},"
    "{name: second, steps: 9, lr: 5e-4, min_lr: 5e-4, global_batch_size: 4, seq_length: 8}]"
)
# Stopped and resumed in the same layout; the phase changes where the run stops.
EXACT = {
    "bf16": [BF16],
    "bf16 zero0": [BF16, ZERO0],
    "phases": [PHASES],
    "swapped": ["memory.swap=[core_attn,moe]", "memory.swap_optimizer=true"],
}
LAYOUTS = {
    "dp2 zero0": [ZERO0],
    "ep2": [EP2],
    "ep2 zero0": [EP2, ZERO0],
    "tp2 etp2": [TP2, ETP2],
    "pp2": [PP2],
    "pp2 vpp2": [PP2, VPP2],
    "cp2": ["parallel.context_parallel_size=2"],
}


def farthest(found: Steps, expected: Steps, steps: range) -> float:
    return max(
        abs(a - b) / abs(b)
        for step in steps
        for a, b in zip(found[step], expected[step], strict=True)
    )


def resume_everywhere(folder: Path) -> dict[str, float]:
    """Differences from ten steps at a stretch with DP 2, by what was done instead."""
    straight, straight_weights = train(folder / "straight", ["train.steps=10"])
    train(folder / "half", ["train.steps=4", "checkpoint.save_every=2"])
    found: dict[str, float] = {}
    same = copy(folder / "half", folder / "same")
    resumed, weights = train(same, ["train.steps=10"])
    found["same layout, losses and norms"] = float(
        any(resumed[step] != straight[step] for step in range(1, 11))
    )
    found["same layout, weights"] = float(
        any(not torch.equal(weights[name], straight_weights[name]) for name in weights)
    )
    for name, overrides in EXACT.items():
        whole, _ = train(folder / f"{name} whole", ["train.steps=6", *overrides])
        train(folder / name, ["train.steps=3", *overrides])
        parts, _ = train(folder / name, ["train.steps=6", *overrides])
        found[f"same layout, {name}"] = float(parts != whole)
    for name, overrides in LAYOUTS.items():
        other = copy(folder / "half", folder / name.replace(" ", "_"))
        there, _ = train(other, ["train.steps=7", *overrides])
        found[f"to {name}"] = farthest(there, straight, range(5, 8))
        back, _ = train(other, ["train.steps=10"])
        found[f"from {name}"] = farthest(back, straight, range(8, 11))
    return found


def resume_alone(folder: Path) -> dict[str, float]:
    """The same with one process instead of two."""
    straight = read_metrics(folder / "straight" / METRICS)
    expected = {row["step"]: (row["loss"], row["grad_norm"]) for row in straight}
    alone, _ = train(copy(folder / "half", folder / "alone"), ["train.steps=7"])
    return {"to one process": farthest(alone, expected, range(5, 8))}


@pytest.mark.distributed
def test_resume_is_exact_in_the_same_layout_and_close_in_every_other(tmp_path):
    found, other_rank = run(2, resume_everywhere, tmp_path)
    print(found)
    exact = [name for name in found if name.startswith("same")]
    assert len(exact) == 2 + len(EXACT)
    for name in exact:
        assert (found.pop(name), other_rank[name]) == (0.0, 0.0), name
    found |= run(1, resume_alone, tmp_path)[0]
    assert {name: value for name, value in found.items() if not value < 1e-5} == {}
    assert len(found) == 2 * len(LAYOUTS) + 1
