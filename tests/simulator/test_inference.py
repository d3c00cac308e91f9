"""Serving forecasts against published latencies, and against arithmetic."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from configs.compose import load
from configs.violation import ConfigError
from pangu.ops import input_transform
from simulator.__main__ import application
from simulator.hardware import Launch, Matmul, load_hardware
from simulator.inference import (
    decode_step,
    forecast,
    largest_batch,
    memory_bytes,
    prefill,
    usable_bytes,
)
from simulator.input_transforms import transform_seconds
from simulator.parameters import attention_linears
from simulator.serving import Serving, serving
from simulator.validation.serving import TABLE, serving_outcomes

PRO = ["model=pangu_pro_moe", "hardware=ascend_910b_280t", "devices=4"]
PRO += ["parallel.tensor_model_parallel_size=4", "inference.weight_dtype=int8"]
PRO += ["inference.compute_dtype=int8", "inference.kv_dtype=int8", "inference.max_new_tokens=2048"]


def make(*overrides: str) -> Serving:
    config = load([*PRO, *overrides])
    return serving(config, load_hardware(config.hardware))


def test_published_latencies_are_within_ten_percent_on_average() -> None:
    outcomes = serving_outcomes()
    with TABLE.open() as lines:
        assert len(outcomes) == len(list(csv.DictReader(lines))) == 13
    errors = [outcome.error for outcome in outcomes]
    assert np.mean(np.abs(errors)) < 0.10  # type: ignore[arg-type]
    judged = [abs(x.error) for x in outcomes if x.split == "judged"]  # type: ignore[arg-type]
    assert len(judged) == 5
    assert np.mean(judged) < 0.10
    assert max(judged) < 0.20


def test_memory_by_hand() -> None:
    # 71.99 B parameters, 1.57 B of them in two 16-bit tables, over 4 cards; a cache of 48 layers,
    # 8 heads, 128 + 128 bytes over 4 cards.
    tables = 2 * 153376 * 5120
    weights = (71.99e9 - tables + 2 * tables) / 4
    cache = 48 * 2 * 256 * 4096
    one = memory_bytes(make(), 1)
    assert one == pytest.approx(weights + cache, rel=2e-3)
    assert memory_bytes(make(), 101) - one == pytest.approx(100 * cache, rel=0.02)
    half = make("inference.weight_dtype=int4")
    assert memory_bytes(half, 1) < 0.55 * one


def test_weights_bound_a_small_batch_and_the_cache_a_long_context() -> None:
    layout = make()
    small = decode_step(layout, 1, 2048)
    assert decode_step(layout, 1, 2048, 2).seconds == pytest.approx(small.seconds, rel=0.25)
    long = decode_step(layout, 256, np.array([4096, 8192]))
    growth = np.diff(long.parts["attention"])[0]
    bytes_more = 64 * 48 * 4096 * 8 * 256  # 256/4 sequences worth of all heads on each card
    reached = 1.6 * 2**40 * 0.75 * 0.42
    assert growth == pytest.approx(bytes_more / reached, rel=0.01)


def test_largest_batch_stops_at_memory_or_latency() -> None:
    layout = make()
    batch, reason = largest_batch(layout)
    assert reason == "memory"
    assert memory_bytes(layout, batch) <= usable_bytes(layout) < memory_bytes(layout, batch + 1)
    limited = make("inference.latency_limit_ms=50")
    quick, reason = largest_batch(limited)
    assert reason == "latency"
    assert 0 < quick < batch
    assert forecast(limited, quick).tpot_seconds <= 0.050
    assert forecast(limited, quick + 4).tpot_seconds > 0.050
    assert largest_batch(make("inference.latency_limit_ms=1"))[0] == 0


def test_drafting_gains_where_it_is_accepted() -> None:
    plain = forecast(make("model.mtp_num_layers=1"), 64)
    good = ["model.mtp_num_layers=1", "inference.draft_tokens=1", "inference.acceptance_rate=0.9"]
    assert forecast(make(*good), 64).tpot_seconds < plain.tpot_seconds
    never = forecast(make(*good[:2], "inference.acceptance_rate=0"), 64)
    assert never.tpot_seconds > plain.tpot_seconds
    assert plain.tokens_per_second_per_device == pytest.approx(64 / plain.tpot_seconds / 4)


def test_transforms_of_inputs_cost_what_the_trainers_compute() -> None:
    left, right = input_transform.factors(5120)
    with FlopCounterMode(display=False) as counted:
        input_transform.kronecker(torch.zeros(3, 5120), torch.eye(left), torch.eye(right))
    plain, turned = make(), make("model.input_transforms=true")
    linear = attention_linears(turned.model)[0]
    ideal = replace(
        turned.hardware,
        memory_bandwidth_gbps=1e15,
        launch_us=Launch(0, 0, 0, 0),
        matmul=Matmul([1.0], [1.0], 1, [(1, 1, 1.0)], 0.0),
    )
    seconds = transform_seconds(replace(turned, hardware=ideal), linear, 3, 1)
    assert seconds * ideal.peak("fp32") == pytest.approx(counted.get_total_flops(), rel=1e-6)
    for part in ("attention_projections", "experts", "shared_experts"):
        assert decode_step(turned, 64, 1024).parts[part] > decode_step(plain, 64, 1024).parts[part]
    assert float(prefill(turned, 1, 512).parts["head"]) == prefill(plain, 1, 512).parts["head"]


def test_hybrid_layouts_and_impossible_ones() -> None:
    hybrid = make("devices=8", "parallel.expert_model_parallel_size=4",
                  "parallel.expert_tensor_parallel_size=2")  # fmt: skip
    assert (hybrid.attention_dp, hybrid.ep, hybrid.etp) == (2, 4, 2)
    assert forecast(hybrid, 64).tpot_seconds < forecast(make(), 64).tpot_seconds
    long = "inference.max_new_tokens=2048"
    mla = load(["model=deepseek_v3", "hardware=cloudmatrix384", "devices=32", long])
    wide = serving(mla, load_hardware(mla.hardware))
    assert (wide.ep, wide.attention_dp) == (32, 32)
    # One layer of DeepSeek-V3 caches 576 elements per token, whatever the heads.
    step = memory_bytes(wide, 64) - memory_bytes(wide, 32)
    assert step == pytest.approx(61 * 576 * 2 * 4096, rel=0.06)
    with pytest.raises(ConfigError, match=r"(?s)tensor_model.*must divide 4.*acceptance_rate=2"):
        make("parallel.tensor_model_parallel_size=3", "inference.acceptance_rate=2")


def test_a_refusal_names_the_devices_that_would_do() -> None:
    command = [sys.executable, "-m", "simulator", "infer", "model=pangu_pro_moe"]
    command += ["hardware=ascend_910b_376t"]
    # 72B parameters of 16 bits: 134 GiB, of 64 GiB a card.
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("devices=1: one sequence does not fit")
    assert refused.stderr.strip().endswith("(devices=4)")
    done = subprocess.run([*command, "devices=4", "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["largest_batch"] > 0
    hopeless = [*command, "devices=4", "inference.latency_limit_ms=0.001"]
    never = subprocess.run(hopeless, capture_output=True, text=True)
    assert never.returncode == 2
    assert never.stderr.strip() == "devices=4: no batch stays within 0.001 ms per token"


def test_a_first_token_that_nobody_waits_for_is_said():
    """Where neither a batch nor a limit was asked for."""
    served = ["infer", "model=pangu_pro_moe", "hardware=ascend_910b_376t", "devices=8", "--json"]
    served += ["inference.max_new_tokens=2048"]
    said = []
    for more in ([], ["inference.latency_limit_ms=50"], ["inference.batch_size=456"]):
        done = CliRunner().invoke(application(["infer"]), [*served, *more])
        said.append(json.loads(done.stdout))
    assert said[0]["ttft_seconds"] > 20
    (warning,) = said[0]["warnings"]
    assert f"first token takes {said[0]['ttft_seconds']:.0f} s" in warning
    assert said[1]["warnings"] == said[2]["warnings"] == []
