"""Rules about layouts: sizes against the number of ranks, and all that is cut into equal parts.

Ranks are never enumerated: every rule is arithmetic on sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from configs.dispatch import why_not
from configs.layout import num_virtual_stages, ranks_per_node
from configs.problem import CP, EP, ETP, PP, TP, VPP, Problem, divides, divisors, get, multiples
from configs.schema import Config


def ranks(config: Config) -> Iterator[Problem]:
    """Sizes against the number of ranks."""
    parallel, world = config.parallel, config.world_size
    world_key = "devices" if config.devices else "launch.processes"
    per_node = 1 if config.devices else config.launch.nodes
    dense = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    expert = (
        parallel.expert_model_parallel_size
        * parallel.expert_tensor_parallel_size
        * parallel.pipeline_model_parallel_size
    )
    for rule, size, keys, names in (
        ("world", dense, (TP, PP, CP), "tensor x pipeline x context"),
        ("expert world", expert, (EP, ETP, PP), "expert x expert-tensor x pipeline"),
    ):
        if world % size:
            options = {key: divisors(world) for key in keys if get(config, key) > 1}
            options[world_key] = [n // per_node for n in multiples(size, world) if n >= per_node]
            sizes = " x ".join(str(get(config, key)) for key in keys)
            reason = f"{names} parallel = {sizes} = {size} does not divide {world} ranks"
            yield Problem(rule, world_key, get(config, world_key), reason, options)


def widths(config: Config) -> Iterator[Problem]:
    """Everything that tensor, context and expert parallelism cut into equal parts."""
    model, parallel = config.model, config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    heads = "model.num_attention_heads"
    reason = "{value} attention heads do not split over {size} tensor-parallel ranks"
    yield from divides(config, "heads/TP", heads, TP, reason)
    all_to_all = cp > 1 and parallel.context_parallel_type == "all_to_all"
    if all_to_all and not model.num_attention_heads % tp and model.num_attention_heads % (tp * cp):
        reason = f"context parallelism by all-to-all splits {model.num_attention_heads} heads over "
        reason += f"TP x CP = {tp} x {cp} ranks"
        options = {
            CP: divisors(model.num_attention_heads),
            TP: divisors(model.num_attention_heads),
            heads: multiples(tp * cp, model.num_attention_heads),
        }
        yield Problem("heads/CP", CP, cp, reason, options)
    groups = model.num_query_groups or model.num_attention_heads
    if model.attention == "gqa" and groups % tp and tp % groups:
        reason = f"{groups} key/value heads neither split over nor repeat on {tp} ranks"
        options = {TP: divisors(groups)}
        options["model.num_query_groups"] = divisors(model.num_attention_heads)
        yield Problem("query groups/TP", TP, tp, reason, options)
    reason = "a vocabulary of {value} does not split over {size} tensor-parallel ranks"
    yield from divides(config, "vocabulary/TP", "model.vocab_size", TP, reason)
    if not model.num_experts or model.num_dense_layers:
        reason = "an MLP width of {value} does not split over {size} tensor-parallel ranks"
        yield from divides(config, "MLP/TP", "model.ffn_hidden_size", TP, reason)
    if model.shared_expert_ffn_hidden_size:
        reason = "the shared expert's width {value} does not split over {size} ranks"
        key = "model.shared_expert_ffn_hidden_size"
        yield from divides(config, "shared expert/TP", key, TP, reason)
    yield from _expert_widths(config)


def _expert_widths(config: Config) -> Iterator[Problem]:
    model, parallel = config.model, config.parallel
    if not model.num_experts:
        for key in (EP, ETP):
            if get(config, key) > 1:
                reason = "a dense model has no experts to spread"
                yield Problem(f"dense {key}", key, get(config, key), reason, {key: [1]})
        if parallel.overlap_expert_parallel:
            key, reason = "parallel.overlap_expert_parallel", "a dense model has no experts"
            yield Problem(f"dense {key}", key, True, reason, {key: [False]})
        return
    reason = "{value} experts do not spread evenly over {size} expert-parallel ranks"
    yield from divides(config, "experts/EP", "model.num_experts", EP, reason)
    reason = "an expert's width {value} does not split over {size} expert-tensor-parallel ranks"
    yield from divides(config, "expert/ETP", "model.moe_ffn_hidden_size", ETP, reason)
    yield from _expert_adapters(config)
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        key = "parallel.sequence_parallel"
        reason = "with tensor parallelism, experts expect each rank to hold its own tokens"
        yield Problem("MoE needs SP", key, False, reason, {key: [True], TP: [1]})
    kind, key = config.moe.dispatcher, "moe.dispatcher"
    sizes = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    per_node = ranks_per_node(config)
    if kind != "auto" and (reason := why_not(kind, config.moe, *sizes, per_node)):
        options: dict[str, list[Any]] = {key: ["auto", "alltoall", "allgather", "deduplicated"]}
        if kind == "moge":
            options[EP] = divisors(config.moe.num_expert_groups)
        if kind == "hierarchical":
            options[ETP] = [1]
            options[EP] = [n for n in divisors(model.num_experts) if n % (per_node or 1) == 0]
        yield Problem("dispatcher", key, kind, reason, options)


def _expert_adapters(config: Config) -> Iterator[Problem]:
    """LoRA beside routed experts, whose matrices are cut on both sides."""
    model, size = config.model, config.parallel.expert_tensor_parallel_size
    modules = model.lora_modules if model.lora_rank else []
    if "experts_fc1" in modules or "experts_fc2" in modules:
        reason = "adapters of experts: {value} hidden channels do not split over {size} ranks"
        yield from divides(config, "adapters/ETP", "model.hidden_size", ETP, reason)
    if size > 1 and model.lora_dropout and "experts_fc1" in modules:
        key = "model.lora_dropout"
        reason = f"{size} expert-tensor-parallel ranks would draw other masks for the same rows"
        yield Problem("adapters/ETP", key, model.lora_dropout, reason, {key: [0.0], ETP: [1]})


def pipeline(config: Config) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.num_layers
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    stages, slots = num_virtual_stages(config), layers + parallel.num_noop_layers
    if vpp > 1 and pp == 1:
        reason = "virtual stages interleave the stages of a pipeline, and there is only one"
        yield Problem("VPP", VPP, vpp, reason, {VPP: [1], PP: divisors(config.world_size)})
    if parallel.overlap_expert_parallel and parallel.schedule != "1f1b":
        key = "parallel.overlap_expert_parallel"
        reason = f"schedule={parallel.schedule} has no backward pass beside a forward to overlap"
        yield Problem("overlap", key, True, reason, {key: [False], "parallel.schedule": ["1f1b"]})
    layout, key = parallel.pipeline_layout, "parallel.pipeline_layout"
    if layout is None and slots % stages:
        reason = f"{slots} layers do not fill PP x VPP = {pp} x {vpp} = {stages} stages evenly"
        options: dict[str, list[Any]] = {
            "parallel.num_noop_layers": [-layers % stages],
            VPP: divisors(slots),
            PP: divisors(slots),
        }
        if stages <= 16:
            options[key] = [[layers // stages + (i < layers % stages) for i in range(stages)]]
        size = PP if pp > 1 else VPP
        yield Problem("stages", size, get(config, size), reason, options)
    if layout is not None and len(layout) != stages:
        reason = f"it names {len(layout)} stages; PP x VPP = {pp} x {vpp} = {stages}"
        yield Problem("layout length", key, layout, reason, hint=f"{stages} numbers, or null")
    elif layout is not None and (sum(layout) != layers or min(layout) < 0):
        reason = f"its layers add up to {sum(layout)}, the model has {layers}"
        hint = f"{stages} numbers >= 0 that add up to {layers}, or null"
        yield Problem("layout sum", key, layout, reason, hint=hint)


def sequence(config: Config) -> Iterator[Problem]:
    """The sequence against CP and TP, for the run and for each of its phases."""
    model, parallel = config.model, config.parallel
    cp = parallel.context_parallel_size
    tp = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    # megatron-core cuts a sequence into 2 x CP pieces, one early and one late for each rank.
    step = (2 * cp if cp > 1 else 1) * tp
    lengths = {"train.seq_length": config.train.seq_length}
    for index, phase in enumerate(config.optimizer.phases):
        if phase.seq_length is not None:
            lengths[f"optimizer.phases[{index}].seq_length"] = phase.seq_length
    for key, length in lengths.items():
        if length < 1 or length % step:
            reason = "does not split into "
            reason += f"2 x CP x TP = 2 x {cp} x {tp}" if cp > 1 else f"TP = {tp}"
            reason += " equal parts"
            options: dict[str, list[Any]] = {CP: divisors(length), TP: divisors(length)}
            hint = ""
            if key == "train.seq_length":
                options[key] = multiples(step, length)
            else:
                hint = "multiples of the parts: " + ", ".join(map(str, multiples(step, length)))
            yield Problem(f"sequence {key}", key, length, reason, options, hint)
        tokens, chunks = config.train.micro_batch_size * length // cp // tp, "moe.dispatch_chunks"
        if model.num_experts and config.moe.dispatch_chunks > max(tokens, 1):
            reason = f"a rank has {tokens} tokens of a micro-batch"
            problem = f"chunks {key}", chunks, config.moe.dispatch_chunks, reason, {chunks: [1, 2]}
            yield Problem(*problem)
        if model.position_embedding == "learned" and length > model.max_position_embeddings:
            position = "model.max_position_embeddings"
            reason = f"learned positions end at {model.max_position_embeddings}"
            yield Problem(f"positions {key}", key, length, reason, {position: [length]})


def batch(config: Config) -> Iterator[Problem]:
    """Global batches against DP, micro-batches and the pipeline."""
    dp, micro = config.data_parallel_size, config.train.micro_batch_size
    pp = config.parallel.pipeline_model_parallel_size
    if not dp:
        return
    sizes = {"train.global_batch_size": config.train.global_batch_size}
    for index, phase in enumerate(config.optimizer.phases):
        if phase.global_batch_size is not None:
            sizes[f"optimizer.phases[{index}].global_batch_size"] = phase.global_batch_size
    interleaved = config.parallel.virtual_pipeline_model_parallel_size > 1 and pp > 1
    for key, size in sizes.items():
        per_pass = micro * dp
        step = per_pass * (pp if interleaved else 1)
        near = multiples(step, size)
        options: dict[str, list[Any]] = {"train.micro_batch_size": divisors(max(size // dp, 1))}
        hint = ""
        if key == "train.global_batch_size":
            options[key] = near
        else:
            hint = f"{key}={' or '.join(map(str, near))}"
        if size < 1 or size % per_pass:
            reason = f"is no multiple of micro-batch x DP = {micro} x {dp} = {per_pass}"
            yield Problem(f"batch {key}", key, size, reason, options, hint)
        elif size % step:
            reason = (
                f"gives {size // per_pass} micro-batches; interleaved stages need a multiple of "
                f"PP = {pp}"
            )
            options[VPP] = [1]
            yield Problem(f"interleaving {key}", key, size, reason, options, hint)
