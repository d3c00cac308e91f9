"""Calculon (calculon-ai/calculon): dense GPT on A100 and H100, without embedding and head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.schema import Config

SYSTEMS = {("a100", 80): "a100_80g", ("h100", 80): "h100_80g_nvl8"}
NODE = 8


def settings(config: Config) -> dict[str, Any]:
    """Its application, execution and system files for a configuration.

    Tensor, data and pipeline parallelism take the node's network as long as they fit in a node
    together, as ranks are numbered. Recomputing norms beside the attention core has no word and is
    left out: it costs little. Sends are not scattered and gathered, as in its own files of the same
    engine.

    Raises:
        ValueError: there is no word for the configuration.
    """
    model, parallel, memory = config.model, config.parallel, config.memory
    hardware = config.hardware or {}
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = config.data_parallel_size
    system = SYSTEMS.get((hardware["name"], int(hardware["memory_gib"])))
    recompute = {"none": "none", "full": "full", "selective": "attn_only"}
    modules = set(memory.recompute_modules)
    selective = memory.recompute_granularity == "selective"
    block = memory.recompute_granularity == "full" and memory.recompute_method == "block"
    precision = "float8" if config.backend.precision == "fp8" else "float16"
    refusals = {
        "no system file for the device": system is None,
        "experts": model.num_experts > 0,
        "gated MLP": model.activation != "gelu",
        "grouped-query attention": model.num_query_groups not in (0, model.num_attention_heads),
        "context parallelism": parallel.context_parallel_size > 1,
        "sharded weights (ZeRO-3)": parallel.zero_stage > 1,
        "recomputation of some layers": block,
        "recomputation of parts other than attention": selective and "core_attn" not in modules,
        "float8 on this device": precision == "float8" and hardware["name"] != "h100",
        "float4": config.backend.precision == "fp4",
    }
    for reason, refused in refusals.items():
        if refused:
            raise ValueError(reason)
    kind = recompute[memory.recompute_granularity]
    sequence = parallel.sequence_parallel and tp > 1
    overlapped = config.simulation.tp_comm_overlap and tp > 1
    return {
        "system": system,
        "application": {
            "hidden": model.hidden_size,
            "feedforward": model.ffn_hidden_size,
            "seq_size": config.train.seq_length,
            "attn_heads": model.num_attention_heads,
            "attn_size": model.kv_channels or model.hidden_size // model.num_attention_heads,
            "num_blocks": model.num_layers,
        },
        "execution": {
            "num_procs": config.world_size,
            "tensor_par": tp,
            "pipeline_par": pp,
            "data_par": dp,
            "tensor_par_net": 0,
            "pipeline_par_net": 0 if tp * dp * pp <= NODE else 1,
            "data_par_net": 0 if tp * dp <= NODE else 1,
            "batch_size": config.train.global_batch_size,
            "microbatch_size": config.train.micro_batch_size,
            "datatype": precision,
            "fused_activation": False,
            "attention_type": "multihead",
            "activation_recompute": kind,
            "pipeline_interleaving": parallel.virtual_pipeline_model_parallel_size,
            "optimizer_sharding": parallel.zero_stage == 1 and dp > 1,
            "tensor_par_comm_type": "rs_ag" if sequence else "ar",
            "tensor_par_overlap": "ring" if overlapped else "none",
            "seq_par_ag_redo": sequence and kind != "full",
            "data_par_overlap": parallel.overlap_grad_reduce and dp > 1,
            "weight_offload": False,
            "activations_offload": False,
            "optimizer_offload": False,
            "training": True,
        },
    }


def open_peer(folder: Path) -> Any:
    """Step seconds and GiB of one setting, by Calculon itself."""
    import json
    import logging

    from calculon.llm import Llm
    from calculon.system import System

    log = logging.getLogger("calculon")
    systems: dict[str, Any] = {}

    def evaluate(question: dict[str, Any]) -> dict[str, float]:
        name = question["system"]
        if name not in systems:
            file = json.loads((folder / "systems" / f"{name}.json").read_text())
            # It gives no time for what does not fit; the rows did fit, whatever it thinks.
            file["mem1"]["GiB"] *= 1000
            systems[name] = System(file)
        model = Llm(Llm.Application(question["application"]), log)
        model.compile(systems[name], Llm.Execution.from_json(question["execution"]))
        model.run(systems[name])
        return {
            "step_seconds": model.get_total_time(),
            "peak_gib": model.get_mem_tier1_cap_req() / 2**30,
        }

    return evaluate


if __name__ == "__main__":
    from serve import serve

    serve(open_peer)
