"""Patches behind pruned layers in the simulator's counts; parameters against the trainer's own are
in `tests/model/test_stage_parameters.py`."""

import pytest

from configs.compose import load
from simulator.layout import from_config
from simulator.memory import stage_contents
from simulator.parameters import count_parameters, model_flops_per_token
from simulator.parts import prepare
from simulator.predict import predict

BASE = ["model=mixtral_8x7b", "hardware=h100", "devices=8", "train.global_batch_size=64"]
BASE += ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=4"]
PATCHED = [*BASE, "model.patched_layers=[5,20]"]
MATRIX = 4096 * 4096


def test_parameters_and_flops():
    plain, patched = load(BASE), load(PATCHED)
    more = count_parameters(patched).total - count_parameters(plain).total
    assert more == 2 * MATRIX
    flops = model_flops_per_token(patched) - model_flops_per_token(plain)
    assert flops == pytest.approx(6 * 2 * MATRIX, rel=1e-6)


def test_operators_stand_on_the_stages_that_hold_the_patches():
    config = load(PATCHED)
    parts = prepare(config, from_config(config))
    held = [int(stage_contents(parts.shapes, rank, 1)[0].patch) for rank in range(4)]
    assert held == [1, 0, 1, 0]  # of 32 layers, eight a stage
    # Half of a micro-batch's tokens on each tensor-parallel rank, by a whole matrix.
    tokens = config.train.micro_batch_size * config.train.seq_length / 2
    by_phase = {operator.phase: operator.flops for operator in parts.blocks.patch.operators}
    assert by_phase["forward"] == by_phase["input_gradient"] == 2 * tokens * MATRIX


def test_a_forecast_is_a_little_slower_and_larger():
    plain, patched = predict(load(BASE)), predict(load(PATCHED))
    assert plain.step_seconds < patched.step_seconds < 1.02 * plain.step_seconds
    more = [b.parameters - a.parameters for a, b in zip(plain.stages, patched.stages, strict=True)]
    assert more == [MATRIX, 0, MATRIX, 0]
