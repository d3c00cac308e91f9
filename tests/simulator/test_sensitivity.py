"""The effects of a machine's figures: those of one changed by hand, and none missing."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from configs.compose import load
from simulator.__main__ import application
from simulator.predict import predict
from simulator.sensitivity import Effect

PLAN = [
    "model=pangu_pro_moe",
    "model.num_layers=2",
    "hardware=a100",
    "devices=2",
    "train.seq_length=4096",
]
PLAN += ["parallel.expert_model_parallel_size=2"]


@pytest.fixture(scope="module")
def effects():
    told = CliRunner().invoke(
        application(["predict"]), ["predict", *PLAN, "--sensitivity", "--json"]
    )
    return [Effect(**found) for found in json.loads(told.output)["sensitivity"]]


def change(figure: str, factor: float) -> float:
    """Of the step with a figure changed by hand."""
    value = load(PLAN).hardware
    for part in figure.split("."):
        value = value[part]
    changed = load([*PLAN, f"hardware.{figure}={factor * value}"])
    return predict(changed).step_seconds / predict(load(PLAN)).step_seconds - 1


@pytest.mark.parametrize("figure", ["memory_bandwidth_gbps", "launch_us.vector"])
def test_an_effect_is_that_of_the_figure_changed_by_hand(effects, figure):
    found = next(effect for effect in effects if effect.figure == figure)
    assert found.lower == pytest.approx(change(figure, 0.9), abs=1e-9)
    assert found.higher == pytest.approx(change(figure, 1.1), abs=1e-9)


def test_the_largest_effect_comes_first_and_what_is_not_used_has_none(effects):
    sizes = [effect.size for effect in effects]
    assert sizes == sorted(sizes, reverse=True)
    found = {effect.figure: effect for effect in effects}
    for name in ("peak_tflops.bf16", "memory_bandwidth_gbps", "links.NVLink 3.bandwidth_gbps"):
        assert found[name].lower > 0 > found[name].higher
    assert not any("InfiniBand" in name for name in found)  # two devices share a node


def test_a_table_of_what_matters(monkeypatch):
    shown = [
        Effect("memory_bandwidth_gbps", 0.05, -0.04, "V"),
        Effect("negligible", 1e-5, None, "U"),
    ]
    monkeypatch.setattr("simulator.sensitivity.sensitivity", lambda config: shown)
    told = CliRunner().invoke(application(["predict"]), ["predict", *PLAN, "--sensitivity"])
    assert "memory_bandwidth_gbps" in told.output
    assert "+5.0%" in told.output
    assert "negligible" not in told.output
