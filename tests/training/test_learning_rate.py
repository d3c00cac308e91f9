"""Learning rates and phases by hand."""

import math

import pytest

from configs.compose import load
from pangu.training.schedule import global_batch_size, learning_rate, phase_at, seq_length

COSINE = ["optimizer.lr=1", "optimizer.min_lr=0.1", "train.steps=110", "optimizer.warmup_steps=10"]


def test_cosine_warms_up_and_ends_at_the_minimum():
    config = load([*COSINE, "optimizer.schedule=cosine"])
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == 1.0
    assert learning_rate(config, 10) == 1.0
    assert learning_rate(config, 60) == pytest.approx(0.55)
    assert learning_rate(config, 35) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(config, 110) == pytest.approx(0.1)


def test_wsd_is_flat_then_linear():
    config = load([*COSINE, "optimizer.schedule=wsd", "optimizer.decay_steps=20"])
    assert learning_rate(config, 50) == learning_rate(config, 90) == 1.0
    assert learning_rate(config, 100) == pytest.approx(0.55)
    assert learning_rate(config, 110) == pytest.approx(0.1)


def test_constant_keeps_its_rate():
    config = load([*COSINE, "optimizer.schedule=constant"])
    assert {learning_rate(config, step) for step in range(10, 111)} == {1.0}


def test_pangu_pros_three_phases():
    config = load(["experiment=pangu_pro_three_phases"])
    general, reasoning = config.optimizer.phases[:2]
    assert phase_at(config, general.steps - 1).phase is general
    at = phase_at(config, general.steps)
    assert (at.phase, at.first_step) == (reasoning, general.steps)
    assert phase_at(config, config.train.steps).phase.name == "annealing"
    assert learning_rate(config, 0) == pytest.approx(3e-4)
    assert learning_rate(config, general.steps - 1) == pytest.approx(3e-5, rel=1e-3)
    assert learning_rate(config, general.steps) == pytest.approx(3e-5)
    tokens = [
        p.steps * global_batch_size(config, p) * seq_length(config, p) / 1e12
        for p in config.optimizer.phases
    ]
    assert tokens == pytest.approx([9.6, 3.0, 0.4], rel=1e-3)
