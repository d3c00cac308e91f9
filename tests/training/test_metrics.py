"""Rows of metrics.jsonl against figures counted by hand, and the file's life."""

import json
import math
import sys

import gloo
import pytest
import torch

from configs.compose import load
from pangu import backends
from pangu.engines.contract import StepResult
from pangu.moe.load import RoutingLoad
from pangu.report.run_files import ExpertLoad, read_metrics
from pangu.training.expert_load import LoadWindow
from pangu.training.metrics import MetricsFile, describe_run, step_row

KEYS = [
    "step",
    "loss",
    "aux_loss",
    "z_loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "step_seconds",
    "tokens_per_second_per_device",
    "model_tflops_per_device",
    "mfu",
    "memory_gib",
    "device_imbalance",
    "expert_imbalance",
    "dropped_tokens",
]


@pytest.fixture(scope="module", autouse=True)
def alone():
    gloo.single()


def row(config, routing=None, tokens=2000):
    result = StepResult(loss=2.0, grad_norm=0.5, tokens=tokens, skipped=False)
    return step_row(
        config,
        result,
        routing,
        step=3,
        learning_rate=1e-3,
        seconds=2.0,
        memory_gib=1.5,
        sequences=8,
        seq_length=256,
    )


def test_flops_are_those_of_the_active_parameters():
    values = row(load(["experiment=quickstart", "backend.peak_tflops=0.5"]))
    qkv, proj = 128 * (128 + 2 * 64), 128 * 128
    router, shared, experts = 16 * 128, 3 * 128 * 128, 4 * 3 * 128 * 64  # 4 of 16 experts
    head, scores = 1024 * 128, 256 * 4 * (32 + 32)
    per_token = 6 * head + 4 * (6 * (qkv + proj + router + shared + experts) + 3 * scores)
    tflops = per_token * 8 * 256 / 2.0 / 1e12
    assert values["model_tflops_per_device"] == pytest.approx(tflops, rel=1e-12)
    assert values["mfu"] == pytest.approx(tflops / 0.5, rel=1e-12)
    assert values["tokens_per_second_per_device"] == 1000.0
    assert list(values) == KEYS


def test_mfu_is_left_out_where_no_peak_is_known():
    assert list(row(load(["experiment=quickstart"]))) == [key for key in KEYS if key != "mfu"]


def test_the_peak_in_use_is_said():
    quickstart = ["experiment=quickstart", "backend=cpu"]
    assert describe_run(load([*quickstart, "backend.peak_tflops=312"])).endswith(
        " CPU, fp32; MFU counts active parameters, against 312 TFLOPS per device"
    )
    line = describe_run(load(quickstart))
    assert line.startswith("moge_tiny: 2.11M parameters, 927K active per token, on 1 × ")
    assert line.endswith(" CPU, fp32")


def test_memory_is_what_the_kernel_reports():
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert backends.current().memory_bytes() == pytest.approx(peak * 1024, rel=0.05)
    assert row(load(["experiment=quickstart"]))["memory_gib"] == 1.5  # as it is told


def test_imbalance_is_the_papers_over_ranks_and_over_experts():
    config = load(["experiment=quickstart", "model.num_experts=4", "moe.top_k=2"])
    # 2048 tokens choose 2 of 4 experts; ranks hold two each.
    even = torch.tensor([1024, 1024, 1024, 1024])
    skewed = torch.tensor([2048, 1024, 512, 508])  # 3072 : 1020, four choices lost
    values = row(config, RoutingLoad({1: even, 2: skewed}, aux_loss=1.25, z_loss=0.5))
    tokens = 4092 / 2
    assert values["device_imbalance"] == pytest.approx((0 + (3072 - 1020) / tokens) / 2)
    assert values["expert_imbalance"] == pytest.approx((0 + (2048 - 508) / tokens) / 2)
    assert values["dropped_tokens"] == 4
    assert (values["aux_loss"], values["z_loss"]) == (1.25, 0.5)


def test_a_skipped_step_is_null_in_the_file(tmp_path):
    metrics = MetricsFile(tmp_path, active=True)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "tokens": 7})
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "tokens": 7,
    }


def test_rows_after_the_step_resumed_from_are_forgotten(tmp_path):
    first = MetricsFile(tmp_path, active=True)
    for step in range(1, 6):
        first.write({"step": step, "loss": float(step)})
    first.write({"step": 5, "validation_loss": 9.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    second = MetricsFile(tmp_path, active=True)
    second.continue_after(3)
    second.write({"step": 4, "loss": 40.0})
    second.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = MetricsFile(tmp_path, active=True)
    metrics.write({"step": 1, "loss": 3.5, "mfu": 0.25, "aux_loss": None})
    metrics.write({"step": 1, "validation_loss": 4.5})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == {
        "loss": 3.5,
        "mfu": 0.25,
        "validation_loss": 4.5,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_costs_no_row(tmp_path, capsys):
    metrics = MetricsFile(tmp_path, active=True)
    metrics.path.symlink_to("/dev/full")
    metrics.write({"step": 1, "loss": 1.0})
    metrics.write({"step": 2, "loss": 2.0})
    assert capsys.readouterr().err.count("No space left on device") == 1
    metrics.path.unlink()
    metrics.write({"step": 3, "loss": 3.0})
    metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_only_rank_zero_writes(tmp_path):
    metrics = MetricsFile(tmp_path / "run", active=False)
    metrics.continue_after(0)
    metrics.write({"step": 1})
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_dead_experts_are_named_and_the_window_spans_two_intervals(tmp_path):
    config = load(["experiment=quickstart"])
    window = LoadWindow(tmp_path, config.moe, active=True)
    window.add(1, {1: torch.tensor([50, 0, 30, 0]), 2: torch.tensor([20, 20, 20, 20])})
    assert window.end_interval() == (
        "dead experts, chosen by no token in steps 1–1: layer 1 experts 1, 3. To bring them back: "
        "a larger moe.aux_loss_coefficient (now 0.01), moe.expert_bias=true, or a lower "
        "optimizer.lr"
    )
    for step in (2, 3):
        window.add(step, {1: torch.tensor([20, 20, 20, 20]), 2: torch.tensor([80, 0, 0, 0])})
    assert "steps 2–3: layer 2 experts 1, 2, 3" in window.end_interval()
    saved = ExpertLoad.read(tmp_path / "expert_load.json")
    assert (saved.first_step, saved.last_step, saved.num_groups) == (1, 3, 4)
    assert saved.counts == {1: [90, 40, 70, 40], 2: [180, 20, 20, 20]}
    assert saved.relative()[1].tolist() == [3.0, 1 / 3, 1 / 3, 1 / 3]
    window.add(4, {1: torch.tensor([4, 0, 0, 0]), 2: torch.tensor([1, 1, 1, 1])})
    assert window.end_interval() == ""  # a handful of tokens proves nothing
    assert ExpertLoad.read(tmp_path / "expert_load.json").first_step == 2


def test_the_balancing_bias_is_written_beside_the_load_and_named_in_the_advice(tmp_path):
    moe = load(["experiment=quickstart", "moe.expert_bias=true"]).moe
    window = LoadWindow(tmp_path, moe, active=True)
    window.add(1, {2: torch.tensor([50, 0, 30, 0])})
    advice = window.end_interval({2: [-0.5, 0.25, 0.0, 0.25]})
    assert advice.endswith(
        "To bring them back: a larger moe.expert_bias_update_rate (now 0.001), or a lower "
        "optimizer.lr"
    )
    saved = ExpertLoad.read(tmp_path / "expert_load.json")
    assert saved.biases == {2: [-0.5, 0.25, 0.0, 0.25]}
