"""What an engine does not train is refused before a run, with values that work."""

import pytest

from configs.check import violations
from configs.compose import load
from configs.violation import ConfigError

DS = "engine=deepspeed"
PP = "parallel.pipeline_model_parallel_size"
TP = "parallel.tensor_model_parallel_size"
EP = "parallel.expert_model_parallel_size"
ZERO = "parallel.zero_stage"
NVME = ["engine.offload=nvme", "engine.nvme_path=drive"]


@pytest.mark.parametrize(
    ("overrides", "key", "suggestion"),
    [
        ([DS, f"{PP}=2"], PP, f"{PP}=1; or engine.name=megatron"),
        ([DS, f"{TP}=2"], TP, f"{TP}=1; or engine.name=megatron"),
        ([DS, "parallel.context_parallel_size=2"], "parallel.context_parallel_size", "=1; or"),
        ([DS, f"{ZERO}=3", f"{EP}=2"], ZERO, f"{ZERO}=0, 1 or 2; or {EP}=1"),
        ([DS, "parallel.overlap_grad_reduce=true"], "parallel.overlap_grad_reduce", "=false; or"),
        ([DS, "backend.precision=bf16", f"{ZERO}=0"], "backend.precision", f"{ZERO}=1, 2 or 3"),
        ([DS, "memory.swap_optimizer=true", "backend=cpu"], "memory.swap_optimizer", "=false; or"),
        ([DS, "moe.placement=dynamic"], "moe.placement", "=static; or"),
        ([DS, "moe.dispatch_chunks=2"], "moe.dispatch_chunks", "=1; or"),
        ([DS, "engine.offload=cpu", f"{ZERO}=0"], "engine.offload", f"none; or {ZERO}=1, 2 or 3"),
        ([DS, *NVME, f"{ZERO}=2"], "engine.offload", f"{ZERO}=3"),
        ([DS, NVME[0], f"{ZERO}=3"], "engine.nvme_path", "engine.nvme_path=FOLDER"),
        ([DS, NVME[1]], "engine.nvme_path", "engine.offload=nvme"),
        ([NVME[1]], "engine.nvme_path", "engine.name=deepspeed"),
        ([DS, "engine.config={optimizer:{type:Lion}}"], "engine.config", "optimizer"),
        ([DS, "engine.config={zero_optimization:{stage:2}}"], "engine.config", ZERO),
        ([DS, "engine.config={gradient_allreduce_op:sum}"], "engine.config", "without it"),
        ([DS, "engine.config={bfloat16:{enabled:true}}"], "engine.config", "backend.precision"),
        ([DS, "engine.config={zero_optimization:{cpu_offload:true}}"], "engine.config", "offload"),
        ([DS, "engine.config={checkpoint:{parallel_write:true}}"], "engine.config", "checkpoint"),
        ([DS, "engine.config={autotuning:{enabled:true}}"], "engine.config", "without it"),
        ([DS, "engine.config={step_per_print:1}"], "engine.config", "did you mean steps_per_print"),
        (
            [DS, "engine.config={zero_optimization:{overlap_com:true}}"],
            "engine.config",
            "did you mean overlap_comm",
        ),
        ([DS, "engine.config={aio:{blocksize:1}}"], "engine.config", "block_size"),
        ([DS, "engine.config={aio:{queue_depth:0}}"], "engine.config", "{aio:{queue_depth:8}}"),
        ([DS, "engine.config={aio:{use_gds:true}}"], "engine.config", "without it"),
        ([DS, "engine.config={zero_optimization:3}"], "engine.config", "{KEY:VALUE}"),
        ([DS, "engine.config={qqqqqq:1}"], "engine.config", "known: "),
        ([f"{ZERO}=2"], ZERO, f"{ZERO}=0 or 1; or engine.name=deepspeed"),
        (["engine.offload=cpu"], "engine.offload", "none; or engine.name=deepspeed"),
        (["engine.config={steps_per_print:1}"], "engine.config", "{}; or engine.name=deepspeed"),
    ],
)
def test_what_an_engine_does_not_train(overrides, key, suggestion):
    (found,) = violations(load(["launch.processes=2", *overrides]))
    assert found.key == key
    assert suggestion in found.suggestion


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_trains_every_stage(stage):
    more = "engine.config={zero_optimization:{overlap_comm:true}}"
    assert violations(load(["launch.processes=2", DS, f"{ZERO}={stage}", more])) == []


def test_a_key_that_is_no_word_is_named():
    with pytest.raises(ConfigError) as error:
        load(["engine=deepspeed", "engine.config={1:2}"])
    (found,) = error.value.violations
    assert found.key.startswith("engine.config.1")
