"""Rules about the shape of the model and its routing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from configs.problem import Problem, divides, divisors, multiples
from configs.schema import Config


def attention(config: Config) -> Iterator[Problem]:
    model, heads = config.model, "model.num_attention_heads"
    if not model.kv_channels and model.attention == "gqa":
        reason = "the head size is not a whole number: hidden_size {value} over {size} heads"
        yield from divides(config, "head size", "model.hidden_size", heads, reason)
    groups = model.num_query_groups or model.num_attention_heads
    if model.num_attention_heads % groups:
        key, count = "model.num_query_groups", model.num_attention_heads
        reason = f"{count} query heads cannot share {groups} key/value heads evenly"
        options = {key: divisors(count), heads: multiples(groups, count)}
        yield Problem("query groups", key, groups, reason, options)
    if model.attention == "mla":
        for name in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
            if getattr(model, name) < 1:
                key = f"model.{name}"
                reason = "latent attention needs this width"
                hint = f"a positive {name}, or model.attention=gqa"
                yield Problem(f"mla {name}", key, getattr(model, name), reason, hint=hint)
        if model.kv_bits and model.key_rounding == "channel":
            reason = "latent attention has no keys before their rotation"
            token = {"model.key_rounding": ["token"]}
            yield Problem("keys", "model.key_rounding", "channel", reason, token)
    if model.position_embedding == "rope":
        mla = model.attention == "mla"
        size = model.kv_channels or model.hidden_size // model.num_attention_heads
        key = "model.qk_pos_emb_head_dim" if mla else "model.kv_channels"
        size = model.qk_pos_emb_head_dim if mla else size
        if size % 2:
            reason = "rotary embedding turns pairs of channels: the head size must be even"
            yield Problem("rope", key, size, reason, {key: [size - 1, size + 1]})
    if model.rope_scaling != "none" and model.rope_fast <= model.rope_slow:
        reason = f"fast pairs turn more often than slow ones, here {model.rope_slow} times"
        ways: dict[str, list[Any]] = {"model.rope_fast": [2 * model.rope_slow]}
        yield Problem("rope scaling", "model.rope_fast", model.rope_fast, reason, ways)


def patches(config: Config) -> Iterator[Problem]:
    model, key = config.model, "model.patched_layers"
    wanted = sorted({layer for layer in model.patched_layers if layer < model.num_layers})
    if model.patched_layers != wanted:
        reason = f"wants numbers of layers from 0 to {model.num_layers - 1}, each once, in order"
        yield Problem("patched layers", key, model.patched_layers, reason, {key: [wanted]})


def adapters(config: Config) -> Iterator[Problem]:
    """LoRA, where there is any."""
    model, key = config.model, "model.lora_modules"
    if not model.lora_rank:
        return
    query = ["linear_q_down_proj", "linear_q_up_proj"] if model.q_lora_rank else ["linear_q_proj"]
    latent = [*query, "linear_kv_down_proj", "linear_kv_up_proj"]
    there = [*(latent if model.attention == "mla" else ["linear_qkv"]), "linear_proj"]
    if not model.num_experts or model.num_dense_layers or model.shared_expert_ffn_hidden_size:
        there += ["linear_fc1", "linear_fc2"]
    if model.num_experts:
        there += ["experts_fc1", "experts_fc2"]
    if wrong := [name for name in model.lora_modules if name not in there]:
        reason = f"this model has no {', '.join(wrong)} beside which adapters could stand"
        yield Problem("adapters", key, model.lora_modules, reason, {key: [there]})
    elif not model.lora_modules:
        yield Problem("no adapters", key, [], "adapters of no module learn nothing", {key: [there]})
    if config.train.leap_heads_only:
        reason = "leap heads are trained alone, and so are adapters: one after the other"
        options: dict[str, list[Any]] = {"model.lora_rank": [0], "train.leap_heads_only": [False]}
        yield Problem("two stages", "model.lora_rank", model.lora_rank, reason, options)


def leap_heads(config: Config) -> Iterator[Problem]:
    """L-MTP's heads, the model's own among them."""
    model, key = config.model, "model.leap_heads"
    if model.leap_heads == 1:
        reason = "one head is the model's own: there is none to leap"
        yield Problem("leap heads", key, 1, reason, {key: [0, 2]})
    if model.leap_heads and model.mtp_num_layers:
        reason = "leap heads and layers of multi-token prediction do the same: a model has either"
        yield Problem("two predictors", key, model.leap_heads, reason, {key: [0]})
    farthest = model.leap_stride * (model.leap_heads - 1)
    if model.leap_heads > 1 and farthest >= config.train.seq_length:
        reason = f"the last head leaps {farthest} tokens, over all of a sequence"
        options = {"train.seq_length": [farthest + 1], "model.leap_stride": [1]}
        yield Problem("leap", "model.leap_stride", model.leap_stride, reason, options)
    if config.train.leap_heads_only and not model.leap_heads:
        key, reason = "train.leap_heads_only", "the model has no leap heads to train"
        yield Problem("leap stage", key, True, reason, {key: [False], "model.leap_heads": [4]})


def experts(config: Config) -> Iterator[Problem]:
    model, moe = config.model, config.moe
    dense = model.num_layers if not model.num_experts else model.num_dense_layers
    if model.num_dense_layers > model.num_layers:
        key, reason = "model.num_dense_layers", f"the model has {model.num_layers} layers"
        options = {key: [0, model.num_layers]}
        yield Problem("dense layers", key, model.num_dense_layers, reason, options)
    if dense and not model.ffn_hidden_size:
        key = "model.ffn_hidden_size"
        reason = f"{dense} dense layers need the width of their MLP"
        yield Problem("dense width", key, 0, reason, {key: [4 * model.hidden_size]})
    if not model.num_experts:
        return
    if not model.moe_ffn_hidden_size:
        key = "model.moe_ffn_hidden_size"
        yield Problem("expert width", key, 0, "experts need a width", {key: [model.hidden_size]})
    if moe.top_k > model.num_experts:
        reason = f"there are only {model.num_experts} experts to choose from"
        options = {"moe.top_k": divisors(model.num_experts)}
        yield Problem("top_k", "moe.top_k", moe.top_k, reason, options)
    yield from _routing(config)
    if moe.score_function == "gated":
        yield from _gated(config)
    if moe.expert_parts:
        yield from _parts(config)


def _routing(config: Config) -> Iterator[Problem]:
    model, moe = config.model, config.moe
    groups = "moe.num_expert_groups"
    if moe.router in ("moge", "group_limited"):
        reason = "{value} experts do not fall into {size} equal groups"
        yield from divides(config, "groups of experts", "model.num_experts", groups, reason)
    if moe.router == "moge":
        reason = (
            "a token takes top_k / groups experts from every group: {value} / {size} is not whole"
        )
        yield from divides(config, "choices per group", "moe.top_k", groups, reason)
    if moe.router == "group_limited":
        key = "moe.topk_group"
        usable = list(range(1, moe.num_expert_groups + 1))
        if moe.topk_group not in usable:
            reason = f"a token uses between 1 and all {moe.num_expert_groups} groups"
            yield Problem("topk_group", key, moe.topk_group, reason, {key: usable})
        elif moe.topk_group * (model.num_experts // moe.num_expert_groups) < moe.top_k:
            reason = (
                f"{moe.topk_group} groups of {model.num_experts // moe.num_expert_groups} experts "
                f"hold fewer than top_k={moe.top_k}"
            )
            yield Problem("topk_group room", key, moe.topk_group, reason, {key: usable})
    after = moe.router in ("top_k", "forced_balance") and moe.score_function == "softmax"
    if moe.softmax_after_top_k and not after:
        key = "moe.softmax_after_top_k"
        reason = "softmax over the chosen logits belongs to router=top_k with softmax scores"
        yield Problem("softmax order", key, True, reason, {key: [False]})
    elif moe.softmax_after_top_k and moe.top_k == 1:
        key = "moe.softmax_after_top_k"
        reason = "the softmax of one chosen logit is always 1: the router would learn nothing"
        yield Problem("softmax of one", key, True, reason, {key: [False]})
    if moe.expert_bias and moe.router in ("expert_choice", "forced_balance"):
        reason = f"router={moe.router} is balanced without a bias"
        yield Problem("expert bias", "moe.expert_bias", True, reason, {"moe.expert_bias": [False]})
    key = "moe.capacity_factor"
    if moe.capacity_factor and moe.router in ("expert_choice", "forced_balance"):
        reason = f"router={moe.router} fills every expert alike: there is nothing to bound"
        yield Problem("capacity", key, moe.capacity_factor, reason, {key: [0.0]})
    elif moe.capacity_factor and moe.expert_parts:
        reason = "experts of several parts share some among all their tokens, and turn none away"
        yield Problem("capacity of parts", key, moe.capacity_factor, reason, {key: [0.0]})


def _parts(config: Config) -> Iterator[Problem]:
    """Experts of several parts, which are chosen as one."""
    model, moe, key = config.model, config.moe, "moe.expert_parts"
    parts, each = moe.expert_parts, moe.shared_parts + moe.active_parts
    if moe.router in ("expert_choice", "forced_balance") or moe.score_function == "gated":
        reason = "parts are chosen inside experts that tokens choose by top_k, moge, group_limited"
        yield Problem("router of parts", key, parts, reason, {key: [0]})
    elif not moe.active_parts or each > parts:
        reason = f"a token has {each} of {parts} parts of an expert, one of them by choice at least"
        options: dict[str, list[Any]] = {"moe.active_parts": [1], key: [0]}
        yield Problem("active parts", "moe.active_parts", moe.active_parts, reason, options)
    elif moe.top_k % each:
        options = {"moe.top_k": multiples(each, model.num_experts), key: [0]}
        reason = f"counts parts, of which a chosen expert has {each}"
        yield Problem("choices of parts", "moe.top_k", moe.top_k, reason, options)
    groups = moe.num_expert_groups if moe.router in ("moge", "group_limited") else 1
    if model.num_experts % (parts * groups):
        reason = f"{model.num_experts} parts are no whole experts of {parts}"
        reason += f", equally many in {groups} groups" if groups > 1 else ""
        yield Problem("whole experts", key, parts, reason, {key: [0]})
    ranks = config.parallel.expert_model_parallel_size
    if model.num_experts % (parts * ranks):
        reason = f"{ranks} ranks hold whole experts, with all {parts} parts"
        options = {"parallel.expert_model_parallel_size": [1]}
        yield Problem(
            "parts of a rank", "parallel.expert_model_parallel_size", ranks, reason, options
        )


def _gated(config: Config) -> Iterator[Problem]:
    """What does not go with the scores of a carved MLP."""
    moe = config.moe
    for name in ("aux_loss_coefficient", "z_loss_coefficient"):
        if value := getattr(moe, name):
            key, reason = f"moe.{name}", "gated scores are balanced by moe.expert_bias, not a loss"
            yield Problem(f"gated {name}", key, value, reason, {key: [0.0]})
    if moe.renormalize:
        key, reason = "moe.renormalize", "the parts of a carved MLP add up with weight 1"
        yield Problem("gated weights", key, True, reason, {key: [False]})
