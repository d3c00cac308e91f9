"""The forecast as a whole: both code paths agree, seconds and bytes add up, mistakes are named."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from configs.check import load_checked
from configs.compose import load
from configs.violation import ConfigError
from simulator.collectives import collective_seconds
from simulator.evaluate import evaluate
from simulator.layout import Layout, from_config
from simulator.memory import StageParameters
from simulator.parts import prepare
from simulator.pipeline import RankSeconds
from simulator.predict import predict
from simulator.step_end import data_parallel
from simulator.trace import chrome_trace

PLAN = ["model=pangu_pro_moe", "hardware=ascend_910b_376t", "train.seq_length=4096"]
SHARDED = ["model=pangu_ultra_dense", "hardware=a100", "devices=64", "parallel.zero_stage=3"]
SHARDED += ["train.seq_length=2048", "train.global_batch_size=64", "memory=full"]
LAYOUTS = {
    "tp": ["devices=8", "parallel.tensor_model_parallel_size=8"],
    "pp": ["devices=8", "parallel.pipeline_model_parallel_size=4"],
    "interleaved": [
        "devices=64",
        "parallel.pipeline_model_parallel_size=4",
        "parallel.virtual_pipeline_model_parallel_size=3",
        "parallel.tensor_model_parallel_size=4",
        "parallel.expert_model_parallel_size=8",
    ],
    "uneven": ["devices=4000", "parallel=pangu_pro"],
    "overlap": ["devices=4000", "parallel=pangu_pro", "parallel.overlap_expert_parallel=true"],
    "full": ["devices=16", "parallel.pipeline_model_parallel_size=2", "memory=full"],
    "context": ["devices=8", "parallel.context_parallel_size=4"],
    "fsdp": ["devices=16", "parallel.zero_stage=3"],
}


@pytest.fixture(params=LAYOUTS)
def config(request):
    overrides = [*PLAN, *LAYOUTS[request.param]]
    plan = load(overrides)
    plan.train.global_batch_size = 20 * plan.data_parallel_size
    return plan


def test_events_and_closed_forms_agree(config):
    events, closed = predict(config), evaluate(config, from_config(config))
    # joined passes also wait for each other's inputs, which the closed form leaves out
    tolerance = 0.05 if config.parallel.overlap_expert_parallel else 0.03
    assert events.step_seconds == pytest.approx(float(closed.step_seconds), rel=tolerance)
    assert events.peak_memory_gib * 2**30 == pytest.approx(float(closed.peak_memory_bytes))
    assert events.mfu == pytest.approx(float(closed.mfu), rel=tolerance)


def test_recomputation_that_stops_early_leaves_out_the_end_of_a_layer():
    plan = load([*SHARDED, "parallel.zero_stage=1"])
    whole = prepare(plan, from_config(plan)).seconds.dense
    plan.simulation.recompute_stops_early = True
    dense = prepare(plan, from_config(plan)).seconds.dense
    end = sum(
        line.seconds
        for line in dense.lines
        if line.phase == "forward" and line.name in ("mlp.fc2", "mlp.residual")
    )
    assert whole.again == whole.forward == dense.forward
    assert end > 0.2 * dense.forward
    assert dense.forward - dense.again == pytest.approx(end)


def test_breakdown_adds_up_to_the_step(config):
    prediction = predict(config)
    assert sum(prediction.breakdown.values()) == pytest.approx(prediction.step_seconds)
    assert min(prediction.breakdown.values()) > -1e-3 * prediction.step_seconds


def test_arrays_give_what_single_layouts_give():
    config = load([*PLAN, "devices=64"])
    config.train.global_batch_size = 512
    tp = np.array([1, 2, 4, 8, 8, 1])
    pp = np.array([8, 4, 2, 1, 4, 2])
    full = np.array([False, True, False, True, False, False])
    dp = 64 // (tp * pp)
    layouts = Layout(
        tp=tp, pp=pp, dp=dp, full_recompute=full, ep=np.array([8, 4, 2, 1, 2, 8]),
        num_microbatches=512 // dp,
    )  # fmt: skip
    many = evaluate(config, layouts)
    for index in range(len(tp)):
        one = evaluate(config, layouts.take(index))
        assert float(one.step_seconds) == pytest.approx(many.step_seconds[index])
        assert float(one.peak_memory_bytes) == pytest.approx(many.peak_memory_bytes[index])


def test_mfu_is_model_flops_over_peak():
    p = predict(load([*PLAN, "devices=8", "train.global_batch_size=80"]))
    flops = 80 * 4096 * p.model_flops_per_token
    assert p.mfu == pytest.approx(flops / p.step_seconds / 8 / 353.9e12)
    assert p.tokens_per_second_per_device == pytest.approx(80 * 4096 / p.step_seconds / 8)


def test_recomputation_costs_a_forward_pass():
    plan = [*PLAN, "devices=8", "train.global_batch_size=80"]
    without, full = predict(load(plan)), predict(load([*plan, "memory=full"]))
    assert full.peak_memory_gib < without.peak_memory_gib
    forward = without.stages[0].forward_seconds
    extra = full.stages[0].backward_seconds - without.stages[0].backward_seconds
    assert 0.85 * forward < extra < forward  # everything but embedding and head


def test_imbalance_of_top_k_costs_time_and_memory():
    plan = [*PLAN, "devices=8", "train.global_batch_size=80", "train.seq_length=512"]
    plan.append("parallel.expert_model_parallel_size=8")
    moge, top_k = predict(load(plan)), predict(load([*plan, "moe=top_k", "moe.top_k=8"]))
    assert moge.expert_load == 1.0 < top_k.expert_load
    assert moge.step_seconds < top_k.step_seconds
    assert moge.peak_memory_gib < top_k.peak_memory_gib


def test_trace_covers_every_pass():
    config = load([*PLAN, "devices=8", "parallel.pipeline_model_parallel_size=4"])
    config.train.global_batch_size = 16
    prediction = predict(config)
    spans = [event for event in chrome_trace(prediction)["traceEvents"] if event["ph"] == "X"]
    passes = [span for span in spans if span.get("cat") in ("F", "B")]
    assert len(passes) == 4 * 2 * prediction.num_microbatches
    last = max(span["ts"] + span["dur"] for span in spans if span["pid"] < 4)
    assert last == pytest.approx(prediction.step_seconds * 1e6)


def test_sizes_that_do_not_divide_are_refused():
    config = load([*PLAN, "devices=12", "parallel.tensor_model_parallel_size=8"])
    with pytest.raises(ConfigError, match="devices=12"):
        predict(config)
    config = load([*PLAN, "devices=16", "train.global_batch_size=3"])
    with pytest.raises(ConfigError, match="global_batch_size=3"):
        predict(config)


def test_machine_without_the_precision_is_named():
    config = load([*PLAN, "devices=8", "backend.precision=fp8", "train.global_batch_size=8"])
    with pytest.raises(ConfigError, match="fp8"):
        predict(config)


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "simulator", *arguments], capture_output=True, text=True
    )


@pytest.mark.end_to_end
def test_command_line(tmp_path):
    plan = [*PLAN, "parallel=pangu_pro", "devices=4000", "train.global_batch_size=1000"]
    trace = tmp_path / "trace.json"
    done = simulate("predict", *plan, "--json", "--explain", "--trace", str(trace))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    expected = predict(load_checked(plan, purpose="plan"))
    assert answer["step_seconds"] == pytest.approx(expected.step_seconds)
    assert answer["peak_memory_gib"] == pytest.approx(expected.peak_memory_gib)
    assert answer["bill"]
    assert json.loads(trace.read_text())["traceEvents"]
    table = simulate("predict", *plan, "--explain")
    assert "expert dispatch and combine" in table.stdout
    assert "vendor-written file" in table.stdout


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["hardware=abacus"], "abacus"),
        (["devices=4001"], "4001"),
        (["train.seq_length=-4"], "seq_length"),
        (["train.seq_lenght=4096"], "seq_length"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments, named):
    done = simulate("predict", *PLAN, "devices=8", *arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_swapping_costs_what_the_host_link_cannot_hide():
    plan = [*PLAN, "devices=8", "train.global_batch_size=80", "memory=selective"]
    modules = "[moe_act,layernorm]"
    again = predict(load([*plan, f"memory.recompute_modules={modules}"]))
    swap = [*PLAN, "devices=8", "train.global_batch_size=80", f"memory.swap={modules}"]
    fast = predict(load([*swap, "hardware.host_link_gbps=1000"]))
    slow = predict(load([*swap, "hardware.host_link_gbps=1"]))
    assert "recomputation" in again.breakdown
    assert "recomputation" not in fast.breakdown
    inputs = 4096 * 2 * 5120 * 2  # of the norms, which leave with their outputs
    kept = [float(found.stages[0].memory.activations) for found in (again, fast)]
    assert kept[0] - kept[1] == 48 * inputs
    moved = 4096 * (8 * 1344 * 2 + 2 * 5120 * 2) + inputs  # bytes of a layer and micro-batch
    waits = slow.breakdown["sharded weights and swapping"]
    most = 48 * slow.num_microbatches * 2 * moved / 1e9
    assert 0.8 * most < waits < most


def test_recomputing_experts_recomputes_the_shared_expert():
    plan = [*PLAN, "devices=8", "train.global_batch_size=80", "memory=selective"]
    moe = predict(load([*plan, "memory.recompute_modules=[moe]"]))
    shared = predict(load([*plan, "memory.recompute_modules=[shared_experts]"]))
    assert moe.stages[0].memory.activations < shared.stages[0].memory.activations
    kept = 48 * 4096 * (2 * 5120 * 2 + 2 * 5120 * 2 + 2 * (40 + 16 + 40) * 128 + 4 * 40 + 8)
    ends = 4096 * (2 * 5120 * 2 + 8)
    assert float(moe.stages[0].memory.activations) == pytest.approx(kept + ends)


def test_copies_of_the_embedding_are_added_up_between_the_end_stages():
    """megatron-core's last reduction: an all-reduce of the table's float32 gradient over the first
    and the last stage, 3 × 16 ranks apart here."""
    config = load([*PLAN, *LAYOUTS["pp"], "devices=64", "train.global_batch_size=64"])
    parts = prepare(config, from_config(config))
    nothing = RankSeconds(0.0, 0.0, 0.0, 0.0)
    end = data_parallel(parts, StageParameters(0.0, 0.0, copied=1e8), nothing)
    alone = collective_seconds(parts.hardware, "all_reduce", 4e8, 2, 48)
    assert float(end.reduce) == pytest.approx(float(alone))
    # over RoCE at 70 % of 25 GB/s, each of the two sends and receives the tensor once
    assert float(end.reduce) == pytest.approx(4e8 / 17.5e9, rel=0.01)


def test_rings_that_know_no_nodes_are_bound_by_one_port():
    """DeepSpeed of 2021: 3 gathers and a reduction (float32 gradients) of every layer, each at
    the rate between nodes (25 GB/s, of which 85 % is reached)."""
    late = predict(load(SHARDED))
    early = predict(load([*SHARDED, "simulation.sharding=deepspeed_2021"]))
    layers = 94 * (3 * 2 + 4) * (early.stages[0].parameters - 2 * 153_600 * 12288) / 94
    moved = layers * 63 / 64 / (25e9 * 0.85)
    assert early.step_seconds > 2 * late.step_seconds
    assert early.step_seconds == pytest.approx(moved, rel=0.1)


def test_exchange_by_kernels_hides_less_than_by_copy_engines():
    plan = ["model=pangu_ultra_moe", "devices=64", "hardware=h100", "train.seq_length=4096"]
    plan += ["parallel.expert_model_parallel_size=64", "parallel.overlap_expert_parallel=true"]
    plan += ["train.global_batch_size=4096", "simulation.layer_overlap=false"]
    key = "expert dispatch and combine"

    def shown(*overrides):
        plain, hidden = (
            predict(load([*plan, *overrides, f"hardware.overlap.exchange={share}"])).breakdown[key]
            for share in (0.0, 0.85)
        )
        return hidden / plain

    # A flat exchange is kernels of the collective library: half of what few cores would hide.
    assert shown() == pytest.approx(1 - 0.85 / 2 * 63 / 64, rel=1e-3)
    assert shown("moe.dispatcher=deduplicated", "simulation.node_forwarding=true") < 0.8 * shown()
    # Where collectives are no kernels, a flat one hides as much as any.
    assert shown("hardware.backend=npu") == pytest.approx(1 - 0.85 * 63 / 64, rel=1e-3)
