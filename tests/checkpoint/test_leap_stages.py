"""L-MTP's stages from checkpoint to checkpoint: heads begin on a model without, then all is
trained; whatever layout each stage has."""

from pathlib import Path

import pytest
import torch
from checkpoint_runs import train
from gloo import run

from configs.violation import ConfigError
from pangu.report.run_files import METRICS, read_metrics

HEADS = ["model.leap_heads=3", "model.tie_embeddings=false"]
LAYOUTS = {
    "dp2": [],
    "tp2": ["parallel.tensor_model_parallel_size=2"],
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
}


def rows(folder):
    return [(r["loss"], r["mtp_loss"], r["grad_norm"]) for r in read_metrics(folder / METRICS)]


def stages(folder: Path):
    """What each stage did to the weights, and the steps of both in every layout."""
    untied = "model.tie_embeddings=false"
    _, plain = train(folder / "plain", ["train.steps=2", untied])
    found, steps = {}, {}
    for name, layout in LAYOUTS.items():
        first, second = folder / f"{name} heads", folder / f"{name} joint"
        resume = [f"checkpoint.resume={folder / 'plain'}", *HEADS, *layout]
        nothing = [*resume, "train.leap_heads_only=true", "train.steps=3", "optimizer.lr=0"]
        _, begun = train(folder / f"{name} begun", nothing)
        _, weights = train(first, [*resume, "train.leap_heads_only=true", "train.steps=4"])
        resume[0] = f"checkpoint.resume={first}"
        train(second, [*resume, "train.steps=6"])
        steps[name] = rows(first) + rows(second)
        found[name] = (plain, begun, weights)
    try:
        train(folder / "other", [f"checkpoint.resume={first}", "model.leap_heads=4", untied])
    except ConfigError as error:
        found["refused"] = str(error)
    return found, steps


@pytest.mark.distributed
def test_heads_are_trained_alone_then_with_the_model(tmp_path):
    (found, steps), _ = run(2, stages, tmp_path)
    assert "model.leap_heads" in found["refused"]
    plain, begun, weights = found["dp2"]
    for name, value in weights.items():
        if ".leap_heads." in name:
            assert not torch.equal(value, begun[name]), name
        else:
            assert torch.equal(value, plain[name]), name
    for number in (0, 1):
        copied = begun[f"0.module.leap_heads.{number}.output_layer.weight"]
        assert torch.equal(copied, plain["0.module.output_layer.weight"])
        assert not begun[f"0.module.leap_heads.{number}.leap_weight"].any()
    for name in ("tp2", "pp2"):
        assert len(steps[name]) == 4
        for mine, theirs in zip(steps[name], steps["dp2"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5), name
