"""From a row of a published table to the configuration that ran.

Tables say less than a configuration needs. What a row leaves open is filled in by rule, from what
its engine does by default, and listed as an assumption of the forecast. The same rules serve any
further row in the same columns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from configs.schema import (
    BackendConfig,
    Config,
    DispatcherType,
    MemoryConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    TrainConfig,
)
from configs.violation import ConfigError
from simulator.evaluate import evaluate
from simulator.hardware import load_hardware
from simulator.layout import from_config
from simulator.memory import fits
from simulator.validation.declared import with_declared
from simulator.validation.machines import NotPredictable, machine, precision
from simulator.validation.recipes import recipe
from simulator.validation.recomputation import memory_policy, recompute_words
from simulator.validation.table import Row
from simulator.validation.traits import (
    DEEPSPEED,
    DROPPED,
    before_overlap,
    forwards,
    gpt_oss,
    traits,
)


@dataclass
class Case:
    """A row's configuration and what was assumed to fill it in."""

    row: Row
    config: Config
    assumptions: list[str] = field(default_factory=list)


# Of public model configurations.
HEAD_SIZES = {"Gemma2-9B": 256, "Gemma2-27B": 128, "Gemma-2B": 256, "Gemma-7B": 256}
# Groups of experts, and how many of them a token may use.
GROUPS = {"DeepSeek-V3": (8, 4), "DeepSeekV3": (8, 4), "DeepSeek-V2": (8, 3)}
VOCABULARIES = {"Mixtral": 32768, "Llama": 128256, "Qwen": 151936, "GPT": 51200}


def case(row: Row) -> Case:
    """The configuration behind a row.

    Raises:
        NotPredictable: the row does not say enough.
    """
    needed = [name for name in ("layers", "hidden", "heads", "seq") if not row.number(name)]
    if needed:
        raise NotPredictable(f"{', '.join(needed)} not given")
    if not row.number("tp") and not row.number("n_devices"):
        raise NotPredictable("layout not given")
    assumed: list[str] = []
    parallel = _parallel(row, assumed)
    devices = row.number("n_devices") or _model_ranks(parallel) * row.number("dp", 1)
    if not row.number("n_devices"):
        assumed.append(f"{devices} devices")
    config = Config(
        model=_model(row, assumed),
        moe=_moe(row),
        parallel=parallel,
        memory=replace(memory_policy(row), swap_optimizer=row.mentions("swap-optimizer")),
        backend=BackendConfig(precision=precision(row)),  # type: ignore[arg-type]
        train=_train(row, assumed),
        simulation=traits(row),
        hardware=machine(row),
        devices=devices,
    )
    config = with_declared(config, row)
    if not config.num_microbatches:
        raise NotPredictable(
            f"global batch {row['global_batch']} does not divide over {devices} devices"
        )
    found = Case(row, config, assumed)
    said = recompute_words(row) or "memory.recompute_granularity" in row.declared
    return found if said else _assume_recomputation(found)


def _model(row: Row, assumed: list[str]) -> ModelConfig:
    gelu = row["mlp"] == "gelu"
    mpt = row["model"].startswith("MPT")
    experts = row.number("n_experts")
    mla = row["mla"] == "yes"
    vocabulary = row.number("vocab")
    if not vocabulary:
        family = next((size for name, size in VOCABULARIES.items() if name in row["model"]), 0)
        vocabulary = family or 128256
        assumed.append(f"vocabulary {vocabulary}")
    head = re.match(r"(\d+)", row["head_dim"])
    dims = re.match(r"(\d+)\+(\d+)rope/v(\d+)", row["head_dim"])
    width = row.number("moe_ffn") or row.number("ffn")
    megatron_gpt = gelu and not mpt
    biases = megatron_gpt or gpt_oss(row)
    model = ModelConfig(
        name=row["model"],
        num_layers=row.number("layers"),
        hidden_size=row.number("hidden"),
        num_attention_heads=row.number("heads"),
        num_query_groups=row.number("kv_heads"),
        vocab_size=vocabulary,
        ffn_hidden_size=row.number("ffn") or 4 * row.number("hidden"),
        kv_channels=int(head.group(1)) if head else HEAD_SIZES.get(row["model"], 0),
        max_position_embeddings=row.number("seq"),
        activation="gelu" if gelu else "swiglu",
        normalization="LayerNorm" if gelu else "RMSNorm",
        position_embedding="learned" if gelu else "rope",
        add_mlp_bias=biases,
        add_qkv_bias=biases,
        add_attention_output_bias=biases,
        tie_embeddings=gelu,
        num_experts=experts,
        moe_ffn_hidden_size=width if experts else 0,
        shared_expert_ffn_hidden_size=_shared_width(row, width),
        num_dense_layers=row.number("dense_layers"),
        mtp_num_layers=1 if row.mentions("1 MTP layer") else 0,
    )
    if not mla:
        return model
    assumed.append("latent ranks 1536 and 512")
    nope, rope, value = (int(x) for x in dims.groups()) if dims else (128, 64, 128)
    return replace(
        model,
        attention="mla",
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_head_dim=nope,
        qk_pos_emb_head_dim=rope,
        v_head_dim=value,
        kv_channels=0,
        qk_layernorm=True,
    )


def _shared_width(row: Row, width: int) -> int:
    text = row["shared_experts"]
    if not row.number("n_experts") or not text:
        return 0
    stated = re.search(r"width (\d+)", text)
    return int(stated.group(1)) if stated else int(text) * width


def _moe(row: Row) -> MoEConfig:
    if not row.number("n_experts"):
        return MoEConfig()
    # Token drop with capacity factor 1 fills every expert to its mean.
    real = row.mentions("dropless, real", "; dropless", "MindSpeed") or row["notes"] == "dropless"
    balanced = not row["notes"].startswith("dropless;") and (
        row.mentions("force-balanced", "forced balance", "SimuMax", *DROPPED) or not real
    )
    groups, chosen = next((x for name, x in GROUPS.items() if name in row["model"]), (1, 0))
    return MoEConfig(
        router="forced_balance" if balanced else "top_k",
        top_k=row.number("topk", 2),
        num_expert_groups=groups,
        topk_group=chosen,
        # Balanced by bias, without an auxiliary loss to speak of.
        expert_bias=re.match(r"DeepSeek-?V3|Kimi", row["model"]) is not None,
        dispatcher=_dispatcher(row),
    )


def _dispatcher(row: Row) -> DispatcherType:
    if forwards(row):
        return "deduplicated"
    # As MindSpeed's scripts for this family have it; the others exchange rows.
    family = "DeepSeek-V2" in row["model"] and row.mentions("script examples/")
    return "allgather" if family else "alltoall"


def _parallel(row: Row, assumed: list[str]) -> ParallelConfig:
    sizes = {name: row.number(name, 1) for name in ("tp", "pp", "vpp", "ep", "etp", "cp")}
    noops = _noop_layers(row)
    if not row.number("vpp") and sizes["pp"] > 1:
        sizes["vpp"] = _virtual_stages(row, (row.number("layers") + noops) // sizes["pp"])
        assumed.append(f"{sizes['vpp']} virtual stages per rank")
    # Before parallel folding, experts were cut as attention is.
    unfolded = row.mentions("Parallel Folding") and not row.mentions("w/ Folding")
    if row.number("n_experts") and not row.number("etp") and (sizes["ep"] == 1 or unfolded):
        sizes["etp"] = sizes["tp"]
    sharded = row.mentions("FSDP", "ZeRO-3")
    modern = row.mentions("Megatron-Bridge", "NeMo", "ModelZoo", "Megatron Core", "MegaScale")
    modern = modern and not before_overlap(row)
    return ParallelConfig(
        tensor_model_parallel_size=sizes["tp"],
        sequence_parallel=not row.mentions("no sequence parallel", "SC21 arXiv", DEEPSPEED),
        pipeline_model_parallel_size=sizes["pp"],
        virtual_pipeline_model_parallel_size=sizes["vpp"],
        num_noop_layers=noops,
        context_parallel_size=sizes["cp"],
        # Megatron's default; its all-to-all is named where a table used it.
        context_parallel_type="all_to_all" if row.mentions("ulysses", "CP A2A") else "ring",
        expert_model_parallel_size=sizes["ep"],
        expert_tensor_parallel_size=sizes["etp"],
        zero_stage=_zero_stage(row, sharded),
        overlap_expert_parallel=_overlaps(row),
        overlap_grad_reduce=modern or sharded or row.mentions("overlap-grad-reduce"),
        overlap_param_gather=modern or sharded or row.mentions("overlap-param-gather"),
    )


OVERLAP = r"(a2a|all-to-all) overlap"


def _overlaps(row: Row) -> bool:
    """Whether expert communication runs beside another micro-batch's computing."""
    published = recipe(row)
    if published:
        return published.overlap
    if row.mentions("moe-fb-overlap", "DualPipe"):
        return True
    notes = row["notes"].lower()
    denied = rf"(no|without|w/o) (ep[- ])?{OVERLAP}|{OVERLAP}:? (off|none|disabled)"
    return re.search(OVERLAP, notes) is not None and re.search(denied, notes) is None


def _virtual_stages(row: Row, layers: int) -> int:
    """Chunks per rank where a table leaves them open: two to four if it says "interleaved"; for
    Megatron-Core's own runs the deepest cut up to eight, as its published scripts have it."""
    if row.mentions("Folding", "Megatron-LM README", "Llama 3 Herd"):
        return next(v for v in range(8, 0, -1) if layers % v == 0)
    if row.mentions("DualPipe"):
        return 2  # every rank holds a stage of each direction
    if row.mentions("interleaved"):
        return next((v for v in (2, 3, 4) if layers % v == 0), 1)
    return 1


def _noop_layers(row: Row) -> int:
    """Llama 3 has a layer less in its first and in its last stage: the first chunk of the first
    rank is the embedding alone, the last of the last rank the loss (arXiv 2407.21783, 3.3.2)."""
    return 2 if row.mentions("Llama 3 Herd") else 0


def _zero_stage(row: Row, sharded: bool) -> int:
    if sharded and row.number("pp", 1) > 1:
        return 1  # beside a pipeline the weights stay gathered for the whole step
    if row.mentions("SHARD_GRAD_OP"):
        return 2
    if sharded:
        return 3
    plain = row.mentions("no distributed optimizer", "SC21 arXiv", "Korthikanti", DEEPSPEED)
    return 0 if plain else 1


def _train(row: Row, assumed: list[str]) -> TrainConfig:
    micro = row.number("micro_batch")
    if not micro:
        micro = _micro_batch(row)
        assumed.append(f"micro-batch {micro}")
    if not row.number("global_batch"):
        raise NotPredictable("global batch not given")
    return TrainConfig(
        micro_batch_size=micro,
        global_batch_size=row.number("global_batch"),
        seq_length=row.number("seq"),
    )


def _micro_batch(row: Row) -> int:
    """1, but in torchtitan's pipelines, which cut the local batch into as many micro-batches as
    there are stages."""
    stages = row.number("pp", 1) * row.number("vpp", 3)
    local = row.number("global_batch") // row.number("dp", 1)
    if row.mentions("torchtitan") and row.number("pp", 1) > 1 and local % stages == 0:
        return local // stages
    return 1


def _model_ranks(parallel: ParallelConfig) -> int:
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def _assume_recomputation(found: Case) -> Case:
    """The least recomputation with which the run fits: none, the attention core and norms and
    activations, or whole layers."""
    policies = (
        ("no recomputation", MemoryConfig()),
        (
            "selective recomputation",
            MemoryConfig(
                recompute_granularity="selective",
                recompute_modules=["core_attn", "layernorm", "moe_act", "mla_up_proj"],
            ),
        ),
        ("full recomputation", MemoryConfig(recompute_granularity="full")),
    )
    for name, memory in policies:
        memory = replace(memory, swap_optimizer=found.config.memory.swap_optimizer)
        chosen = Case(found.row, replace(found.config, memory=memory), [*found.assumptions, name])
        try:
            result = evaluate(chosen.config, from_config(chosen.config))
        except ConfigError:
            continue
        if fits(
            load_hardware(chosen.config.hardware), result.peak_memory_bytes, result.buffer_bytes
        ):
            break
    return chosen
