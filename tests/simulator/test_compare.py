"""Models × hardware: every pair gets its own best layout, and gaps say why."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest

from configs.compose import load
from simulator.compare import compare
from simulator.search import search

SMALL = ["devices=8", "train.global_batch_size=32", "train.seq_length=2048", "model.num_layers=4"]


def plan(model: str, hardware: str, *more: str):
    lines = [f"model={model}", f"hardware={hardware}", *SMALL, *more]
    return model, hardware, partial(load, lines)


def test_pairs_are_what_search_finds():
    plans = [plan("pangu_pro_moe", machine) for machine in ("ascend_910b_376t", "h100")]
    ascend, h100 = compare(plans, given=False)
    best = search(plans[1][2](), top=1).choices[0].prediction
    assert h100.prediction is not None
    assert ascend.prediction is not None
    assert h100.prediction.step_seconds == best.step_seconds
    assert h100.prediction.peak_tflops == 989
    assert ascend.prediction.peak_tflops == 353.9
    # 700 W for the seconds that a trillion tokens take on one device
    joules = 700 * 1e12 / best.tokens_per_second_per_device
    assert h100.energy_mwh == pytest.approx(joules / 3.6e9)
    assert ascend.energy_mwh is None
    assert h100.cost is None


def test_price_and_given_layout():
    more = ["+hardware.price_per_hour=2", "parallel.tensor_model_parallel_size=8"]
    (pair,) = compare([plan("pangu_pro_moe", "h100", *more)], given=True)
    assert pair.config is not None
    assert pair.config.parallel.tensor_model_parallel_size == 8
    hours = 1e12 / pair.prediction.tokens_per_second_per_device / 3600  # type: ignore[union-attr]
    assert pair.cost == pytest.approx(2 * hours)


def test_a_pair_that_does_not_fit_says_why():
    plans = [plan("pangu_ultra_moe", "h100", "model.num_layers=61"), plan("pangu_pro_moe", "h100")]
    without, fits = compare(plans, given=False)
    assert without.prediction is None
    assert "layouts fits: the smallest peak is" in without.reason
    assert without.to_json()["tokens_per_second_per_device"] is None
    assert fits.prediction is not None


@pytest.mark.end_to_end
def test_command_line():
    command = [sys.executable, "-m", "simulator", "compare"]
    lines = ["model=pangu_pro_moe", "hardware=h100,ascend_910b_376t", *SMALL]
    done = subprocess.run([*command, *lines, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = json.loads(done.stdout)["pairs"]
    assert [pair["hardware"] for pair in pairs] == ["h100", "ascend_910b_376t"]
    assert pairs[0]["mfu"] > 0
    lines[1] = "hardware=h100,abacus"
    done = subprocess.run([*command, *lines], capture_output=True, text=True)
    assert done.returncode == 2
    assert "abacus" in done.stderr
    assert "Traceback" not in done.stderr
