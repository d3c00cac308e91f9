"""Layers that the host issues one by one: how many calls, what they take, and when they show."""

from __future__ import annotations

import numpy as np
import pytest

from configs.compose import load
from simulator.hardware import load_hardware
from simulator.layout import from_config
from simulator.parts import prepare
from simulator.passes import waiting
from simulator.predict import predict
from simulator.validation.measure import outcome
from simulator.validation.table import read_table

GPT = ["model=pangu_ultra_dense", "hardware=a100", "devices=1", "train.seq_length=1024"]
GPT += ["model.num_layers=12", "model.hidden_size=1024", "model.num_attention_heads=16"]
GPT += ["model.num_query_groups=0", "model.kv_channels=64", "model.ffn_hidden_size=4096"]
GPT += ["model.sandwich_norm=false", "simulation=fused", "simulation.fused_attention=false"]
GPT += ["train.micro_batch_size=1", "train.global_batch_size=4"]


def test_calls_of_a_layer() -> None:
    """Forward: two norms, rotary embedding, four products, the activation, two sums, and unfused
    attention's six. Backward: as many elementwise, each product twice, attention's eight."""
    config = load(GPT)
    parts = prepare(config, from_config(config))
    each = load_hardware(config.hardware).launch_us.host * 1e-6
    assert float(parts.seconds.dense.host_forward) == pytest.approx((2 + 1 + 4 + 1 + 2 + 6) * each)
    backward = 2 + 1 + 2 * 4 + 1 + 2 + 8
    assert float(parts.seconds.dense.host_backward) == pytest.approx(backward * each)


def test_messages_are_calls_too() -> None:
    config = load([*GPT, "devices=2", "parallel.tensor_model_parallel_size=2"])
    alone, cut = (prepare(each, from_config(each)).seconds.dense for each in (load(GPT), config))
    each = 63e-6
    # two gathered and two reduced forward; backward the inputs once more
    assert float(cut.host_forward - alone.host_forward) == pytest.approx(4 * each)
    assert float(cut.host_backward - alone.host_backward) == pytest.approx(6 * each)


def test_no_size_of_a_model_escapes_the_floor() -> None:
    eager = predict(load(GPT))
    narrow = predict(load([*GPT, "model.hidden_size=512", "model.num_attention_heads=8"]))
    assert narrow.step_seconds == pytest.approx(eager.step_seconds, rel=0.15)
    captured = predict(load([*GPT, "simulation.launch=captured"]))
    assert captured.step_seconds < 0.75 * eager.step_seconds
    assert "waiting for the host" in eager.breakdown
    assert "waiting for the host" not in captured.breakdown
    assert sum(eager.breakdown.values()) == pytest.approx(eager.step_seconds)
    whole = predict(load([*GPT, "memory=full"]))
    again = 4 * 12 * 16 * 63e-6  # micro-batches, layers, calls forward
    assert whole.step_seconds - eager.step_seconds == pytest.approx(again, rel=0.15)


def test_who_waits() -> None:
    assert waiting(0.0, 3.0) == 0.0
    assert waiting(10.0, 1.0) == pytest.approx(9.0, rel=1e-3)
    assert waiting(4.0, 4.0) == pytest.approx(4.0 * (2 ** (1 / 7) - 1))
    # a host that waits for the device in every layer
    assert waiting(3.0, 4.0, 2.0) == pytest.approx(1.0)


def test_a_host_that_reads_counts_cannot_issue_ahead() -> None:
    run = ["model=qwen3_30b_a3b", "hardware=h100", "devices=8", "train.seq_length=4096"]
    run += ["parallel.expert_model_parallel_size=8", "train.global_batch_size=64"]
    run += ["model.num_layers=8", "moe=forced_balance", "simulation=fused"]
    ahead = predict(load(run)).step_seconds
    reading = predict(load([*run, "simulation.host_reads_counts=true"])).step_seconds
    assert reading > 1.05 * ahead
    dense = [*GPT, "simulation.host_reads_counts=true"]
    assert predict(load(dense)).step_seconds == predict(load(GPT)).step_seconds


def test_published_runs_of_one_node() -> None:
    """36 runs of small models, 76 % too fast at worst before there was a host: they calibrate."""
    found = [outcome(row, True) for row in read_table() if row["id"].startswith("vtrain_single")]
    errors = [each.error for each in found if each.error is not None]
    assert len(errors) == 36
    assert {each.split for each in found} == {"calibrated"}
    assert np.mean(np.abs(errors)) < 0.08
    assert 0.97 < np.median(errors) + 1 < 1.03
