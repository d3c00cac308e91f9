"""Which tensors of Hugging Face's classes each of ours is made of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from configs.schema import Config, ModelConfig
from pangu.weights.architectures import Architecture
from pangu.weights.links import (
    Link,
    experts_in,
    experts_out,
    fused_experts_in,
    fused_experts_out,
    query_key_value,
    rows,
    same,
)


def links(config: Config, kind: Architecture, present: Collection[str] = ()) -> list[Link]:
    """Every tensor of our model and what it is made of.

    Experts that `present` holds in one tensor per layer (as transformers 5 has them in memory) are
    taken so; else each expert has tensors of its own, which is how they are written.
    """
    model = config.model
    found = [
        same("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        same("decoder.final_layernorm.weight", "model.norm.weight"),
    ]
    if not model.tie_embeddings:
        found.append(same("output_layer.weight", "lm_head.weight"))
    for number in range(model.num_layers):
        layer = (f"decoder.layers.{number}.", f"model.layers.{number}.")
        moe = bool(model.num_experts) and number >= model.num_dense_layers
        found += _layer(config, kind, *layer, moe=moe, present=present)
        if number in model.patched_layers:
            found.append(same(*(f"{prefix}layer_patch.weight" for prefix in layer)))
    for depth in range(model.mtp_num_layers):
        ours, theirs = f"mtp.layers.{depth}.", f"model.layers.{model.num_layers + depth}."
        found += [
            same(f"{ours}enorm.weight", f"{theirs}enorm.weight"),
            same(f"{ours}hnorm.weight", f"{theirs}hnorm.weight"),
            same(f"{ours}eh_proj.weight", f"{theirs}eh_proj.weight"),
            same(f"{ours}final_layernorm.weight", f"{theirs}shared_head.norm.weight"),
        ]
        inner = f"{ours}transformer_layer."
        found += _layer(config, kind, inner, theirs, moe=bool(model.num_experts), present=present)
    return found


def copies(config: Config) -> dict[str, str]:
    """Tensors that a file may hold beside those of `links`, and the one each must equal: tied
    heads, and the embedding and head that DeepSeek's MTP layers repeat."""
    model = config.model
    table = {"lm_head.weight": "model.embed_tokens.weight"} if model.tie_embeddings else {}
    head = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    for depth in range(model.mtp_num_layers):
        theirs = f"model.layers.{model.num_layers + depth}."
        table[f"{theirs}embed_tokens.weight"] = "model.embed_tokens.weight"
        table[f"{theirs}shared_head.head.weight"] = head
    return table


def _layer(
    config: Config,
    kind: Architecture,
    ours: str,
    theirs: str,
    *,
    moe: bool,
    present: Collection[str],
) -> list[Link]:
    found = [
        same(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight"),
        same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight"),
        *_attention(config.model, f"{ours}self_attention.", f"{theirs}self_attn."),
    ]
    if not moe:
        return found + _mlp(f"{ours}mlp.", f"{theirs}mlp.")
    # In memory transformers calls every MoE block `mlp`.
    block = kind.block if f"{theirs}mlp.{kind.router}.weight" not in present else "mlp"
    return found + _moe(config, kind, f"{ours}mlp.", f"{theirs}{block}.", present)


def _attention(model: ModelConfig, ours: str, theirs: str) -> list[Link]:
    found = [same(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight")]
    if model.add_attention_output_bias:
        found.append(same(f"{ours}linear_proj.bias", f"{theirs}o_proj.bias"))
    if model.attention == "mla":
        query = (
            {
                "linear_q_down_proj": "q_a_proj",
                "q_layernorm": "q_a_layernorm",
                "linear_q_up_proj": "q_b_proj",
            }
            if model.q_lora_rank
            else {"linear_q_proj": "q_proj"}
        )
        rest = {
            "linear_kv_down_proj": "kv_a_proj_with_mqa",
            "kv_layernorm": "kv_a_layernorm",
            "linear_kv_up_proj": "kv_b_proj",
        }
        table = query | rest
        return found + [same(f"{ours}{a}.weight", f"{theirs}{b}.weight") for a, b in table.items()]
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    for part in ("weight", "bias") if model.add_qkv_bias else ("weight",):
        names = (f"{theirs}q_proj.{part}", f"{theirs}k_proj.{part}", f"{theirs}v_proj.{part}")
        found.append(query_key_value(f"{ours}linear_qkv.{part}", names, groups, heads))
    if model.qk_layernorm:
        found.append(same(f"{ours}q_layernorm.weight", f"{theirs}q_norm.weight"))
        found.append(same(f"{ours}k_layernorm.weight", f"{theirs}k_norm.weight"))
    return found


def _mlp(ours: str, theirs: str) -> list[Link]:
    gate_up = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    return [
        rows(f"{ours}linear_fc1.weight", *gate_up),
        same(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight"),
    ]


def _moe(
    config: Config, kind: Architecture, ours: str, theirs: str, present: Collection[str]
) -> list[Link]:
    model, moe = config.model, config.moe
    found = [same(f"{ours}router.weight", f"{theirs}{kind.router}.weight")]
    if moe.score_function == "gated":
        found.append(same(f"{ours}router.up_weight", f"{theirs}{kind.router}.up_weight"))
    if moe.expert_bias:
        bias = f"{theirs}{kind.router}.e_score_correction_bias"
        found.append(same(f"{ours}router.expert_bias", bias))
    if moe.router_scale:
        found.append(
            replace(
                same(f"{ours}router.router_scale", f"{theirs}router_scale"),
                join=lambda parts: parts[0].flatten(),
                split=lambda whole: [whole[None]],  # released as [1, E]
            )
        )
    if model.shared_expert_ffn_hidden_size:
        found += _mlp(f"{ours}shared_experts.", f"{theirs}{kind.shared}.")
    into, out = f"{ours}experts.w1", f"{ours}experts.w2"
    if f"{theirs}experts.gate_up_proj" in present:
        found.append(fused_experts_in(into, f"{theirs}experts.gate_up_proj"))
        found.append(fused_experts_out(out, f"{theirs}experts.down_proj"))
        return found
    gate, up, down = kind.expert_parts
    each = [f"{theirs}experts.{number}." for number in range(model.num_experts)]
    found.append(experts_in(into, [(f"{e}{gate}.weight", f"{e}{up}.weight") for e in each]))
    found.append(experts_out(out, [f"{e}{down}.weight" for e in each]))
    return found
