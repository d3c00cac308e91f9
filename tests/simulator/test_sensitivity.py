"""The effects of a machine's figures: those of one changed by hand, and none missing."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from configs.compose import load
from simulator.__main__ import application
from simulator.predict import predict
from simulator.sensitivity import sensitivity

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
    return {effect.figure: effect for effect in sensitivity(load(PLAN))}


@pytest.mark.parametrize("figure", ["memory_bandwidth_gbps", "launch_us.vector"])
def test_an_effect_is_that_of_the_figure_changed_by_hand(effects, figure):
    config = load(PLAN)
    step = predict(config).step_seconds
    value = config.hardware
    for part in figure.split("."):
        value = value[part]
    for factor, found in ((0.9, effects[figure].lower), (1.1, effects[figure].higher)):
        changed = predict(load([*PLAN, f"hardware.{figure}={factor * value}"])).step_seconds
        assert found == pytest.approx(changed / step - 1, abs=1e-9)


def test_faster_is_never_slower_and_the_largest_comes_first(effects):
    sizes = [effect.size for effect in effects.values()]
    assert sizes == sorted(sizes, reverse=True)
    for name, effect in effects.items():
        sign = 1 if "_us" in name or "half" in name else -1
        assert sign * (effect.higher or 0.0) >= -1e-9, name
    assert "links.NVLink 3.bandwidth_gbps" in effects  # the one that two devices use
    assert not any("InfiniBand" in name for name in effects)


def test_command_line():
    command = ["predict", *PLAN, "--sensitivity"]
    shown = CliRunner().invoke(application(["predict"]), command)
    assert "memory_bandwidth_gbps" in shown.output
    told = CliRunner().invoke(application(["predict"]), [*command, "--json"])
    first = json.loads(told.output)["sensitivity"][0]
    assert set(first) == {"figure", "lower", "higher", "evidence"}
