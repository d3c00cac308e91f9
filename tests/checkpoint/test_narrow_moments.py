"""Moments in bfloat16 go through checkpoints to the bit, into another layout, and into float32."""

from pathlib import Path

import pytest
from checkpoint_runs import train
from gloo import run

SAVED, STEPS = 2, 5  # a step is taken in float32 and kept in 16 bits: the next one tells
NARROW = ["optimizer.moments_dtype=bf16", f"train.steps={STEPS}", f"checkpoint.save_every={SAVED}"]
NARROW += ["checkpoint.keep_last=9", "checkpoint.save_at_end=false", "checkpoint.async_save=false"]
ELSEWHERE = {
    "the same": [],
    "ep 2 sharded": ["parallel.expert_model_parallel_size=2", "parallel.zero_stage=1"],
    "bf16 weights": ["backend.precision=bf16"],
    "float32 moments": ["optimizer.moments_dtype=fp32"],
}


def resumed(folder: Path) -> tuple[dict, dict[str, dict]]:
    straight, _ = train(folder / "run", [*NARROW, "parallel.zero_stage=0"])
    source = f"checkpoint.resume={folder}/run/checkpoints/step_{SAVED:08}"
    found = {
        name: train(folder / name, [*NARROW, "parallel.zero_stage=0", *changes, source])[0]
        for name, changes in ELSEWHERE.items()
    }
    return straight, found


@pytest.mark.distributed
def test_narrow_moments_go_on_as_they_were(tmp_path: Path) -> None:
    straight, found = run(2, resumed, tmp_path)[0]
    for step in range(SAVED + 1, STEPS + 1):
        assert found["the same"][step] == straight[step]
        assert found["ep 2 sharded"][step] == pytest.approx(straight[step], rel=1e-5)
        for name, close in (("bf16 weights", 2e-2), ("float32 moments", 2e-3)):
            assert found[name][step] == pytest.approx(straight[step], rel=close)
    assert found["float32 moments"][STEPS] != straight[STEPS]
