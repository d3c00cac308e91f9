"""Traits of engines that publish their step times: what each changes in the counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs.compose import load
from simulator.counts.layer import layer
from simulator.counts.records import Counts, Message, shapes
from simulator.evaluate import evaluate
from simulator.layout import SCHEDULES, Layout, from_config, stage_counts
from simulator.memory import stage_contents
from simulator.parts import prepare
from simulator.passes import rank_seconds
from simulator.predict import predict
from simulator.timeline import UnitSeconds, build
from simulator.validation.engine import case
from simulator.validation.table import PACKAGED, read_table

DENSE = ["model=pangu_ultra_dense", "devices=8", "train.seq_length=4096", "simulation=fused"]
DENSE += ["parallel.tensor_model_parallel_size=8", "hardware=h100_96g", "model.num_layers=8"]
ROWS = {row["id"]: row for row in read_table(Path(PACKAGED))}


def counted(*traits: str) -> Counts:
    config = load([*DENSE, *(f"simulation.{trait}" for trait in traits)])
    return layer(shapes(config, from_config(config)), "dense")


def sent(counts: Counts, phase: str = "") -> list[Message]:
    return [m for m in counts.messages if m.count and (not phase or m.phase == phase)]


def test_attention_and_mlp_side_by_side_share_norm_gathering_and_reduction() -> None:
    plain, shared = counted(), counted("parallel_block=true")
    # forward 4 messages, backward 4 and 2 gathered again: half of each
    assert len(sent(plain)) == 10
    assert len(sent(shared)) == 5
    assert len(sent(shared, "forward")) == 2
    norms = [o for o in shared.operators if o.name in ("attention.norm", "mlp.norm")]
    assert {o.name for o in norms} == {"attention.norm"}
    products = [o for o in shared.operators if o.kind == "matmul"]
    assert products == [o for o in plain.operators if o.kind == "matmul"]


def test_collectives_of_the_backward_pass_stand_alone_in_dtensor() -> None:
    megatron, dtensor = counted(), counted("tp_gradient_overlap=false")
    beside = {m.name: m.beside for m in megatron.messages}
    assert beside["mlp.fc1 gradient"] == "mlp.fc1:weight_gradient"
    assert beside["mlp.fc1 input again"] == "mlp.fc1:input_gradient"
    assert not any(m.beside for m in dtensor.messages if m.group == "tp")
    # Fused, each runs inside the product that makes or takes it.
    fused = counted("tp_gradient_overlap=false", "tp_comm_overlap=true")
    beside = {m.name: m.beside for m in fused.messages}
    assert beside["mlp.fc1 gradient"] == "mlp.fc1:input_gradient"
    assert beside["mlp.fc1 input again"] == "mlp.fc1:weight_gradient"


def test_what_is_gathered_in_float8_is_half() -> None:
    wide = load([*DENSE, "backend.precision=fp8"])
    narrow = load([*DENSE, "backend.precision=fp8", "simulation.fp8_gathers=true"])
    before, after = (layer(shapes(c, from_config(c)), "dense").messages for c in (wide, narrow))
    for one, other in zip(before, after, strict=True):
        part = 0.5 if one.kind == "all_gather" else 1.0
        assert float(other.bytes) == pytest.approx(part * float(one.bytes))
    # 16-bit training has nothing to gather in float8
    assert counted("fp8_gathers=true").messages == counted().messages


def test_passes_of_a_cast() -> None:
    def cast(passes: float) -> float:
        trait = f"simulation.fp8_cast_passes={passes}"
        config = load([*DENSE, "backend.precision=fp8", trait])
        operators = layer(shapes(config, from_config(config)), "dense").operators
        return sum(float(o.bytes) for o in operators if o.name.endswith("quantised"))

    assert cast(4.0) == pytest.approx(4 * cast(1.0))


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 8), (4, 3, 16)])
def test_interleaved_sends_that_are_waited_for(p: int, v: int, m: int) -> None:
    """Every chunk's send, forward and backward, is the sender's time: on a rank in the middle v
    of each for every micro-batch."""
    units = [[UnitSeconds(1.0 / v, 1.0 / v, 1.0 / v) for _ in range(v)] for _ in range(p)]

    def seconds(overlap: bool, send: float) -> float:
        layout = Layout(pp=p, vpp=v, num_microbatches=m, overlap_sends=overlap)
        return build(layout, units, send).seconds

    still = seconds(True, 0.0)
    assert seconds(False, 0.0) == pytest.approx(still)
    # the first rank sends forward v times and backward v - 1 times
    least = still + m * (2 * v - 1) * 0.01
    assert least <= seconds(False, 0.01) <= least + 2 * p * v * 0.01
    assert seconds(True, 0.01) < seconds(False, 0.01)


def test_closed_form_of_sends_that_are_waited_for() -> None:
    run = ["model=pangu_ultra_dense", "hardware=a100", "devices=64", "train.seq_length=2048"]
    run += ["parallel.tensor_model_parallel_size=8", "parallel.pipeline_model_parallel_size=8"]
    run += ["parallel.virtual_pipeline_model_parallel_size=4", "model.num_layers=64"]
    run += ["train.global_batch_size=64", "simulation=fused", "simulation.overlap_sends=false"]
    config = load(run)
    closed = float(np.asarray(evaluate(config, from_config(config)).step_seconds))
    assert closed == pytest.approx(predict(config).step_seconds, rel=0.02)


def test_the_host_does_not_disappear_with_the_exchange() -> None:
    """Side by side, two passes take what is left of them and the host issues both: of an exchange
    that hides, only what the host does not need shows as saved."""
    run = ["model=qwen3_30b_a3b", "hardware=h100", "devices=64", "train.seq_length=4096"]
    run += ["parallel.expert_model_parallel_size=16", "parallel.pipeline_model_parallel_size=2"]
    run += [
        "parallel.virtual_pipeline_model_parallel_size=2",
        "parallel.overlap_expert_parallel=true",
    ]
    run += ["simulation=fused", "simulation.host_reads_counts=true", "moe=forced_balance"]
    run += ["train.global_batch_size=256"]

    def saved(launch: str) -> float:
        config = load([*run, f"simulation.launch={launch}"])
        parts = prepare(config, from_config(config))
        return float(rank_seconds(parts, stage_contents(parts.shapes, 0, 2)).hideable)

    assert 0 < saved("eager") < 0.95 * saved("captured")


def test_what_papers_say_of_their_engines() -> None:
    llama = case(ROWS["llama3_405b_1"]).config
    stages = stage_counts(llama.model, from_config(llama))
    assert stages == [0, *[1] * 126, 0]
    assert not llama.simulation.tp_gradient_overlap
    theirs, baseline = (
        case(ROWS[f"megascale_{name}_256"]).config for name in ("megascale", "megatron-lm")
    )
    assert theirs.simulation.parallel_block
    assert theirs.simulation.tp_comm_overlap
    assert theirs.simulation.overlap_sends
    assert theirs.parallel.overlap_grad_reduce
    assert not baseline.simulation.parallel_block
    assert not baseline.simulation.overlap_sends
    assert not baseline.parallel.overlap_grad_reduce
    rowwise = case(ROWS["titan_async_Llama-3.1-8B_float8_rowwise_vanilla_TP"]).config.simulation
    tensorwise = case(
        ROWS["titan_async_Llama-3.1-8B_float8_tensorwise_vanilla_TP"]
    ).config.simulation
    assert rowwise.fp8_cast_passes > tensorwise.fp8_cast_passes == 1.0
    assert tensorwise.fp8_gathers
    assert not rowwise.fp8_gathers
    assert SCHEDULES[from_config(llama).schedule] == "1f1b"
