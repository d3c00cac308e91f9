"""The model classes of Hugging Face that have a place in our tree: their `config.json` to ours and
back.

A field that would change the function and that our model does not have is refused, never dropped.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from configs.compose import from_dict
from configs.schema import Config, ModelConfig, MoEConfig
from configs.violation import ConfigError
from pangu.checkpoint.tensor_files import WeightsError
from pangu.weights import rope_scaling

Fields = dict[str, Any]  # a config.json


@dataclass(frozen=True)
class Architecture:
    """One class. `router`, `experts` and `shared` are the names of those parts inside a layer's
    MoE block `block`; `expert_parts` are gate, up and down of one expert."""

    name: str
    model_type: str
    block: str = "mlp"
    router: str = "gate"
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts"


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("LlamaForCausalLM", "llama"),
        Architecture("Qwen2ForCausalLM", "qwen2"),
        Architecture("Qwen3ForCausalLM", "qwen3"),
        Architecture(
            "MixtralForCausalLM",
            "mixtral",
            block="block_sparse_moe",
            expert_parts=("w1", "w3", "w2"),
        ),
        Architecture("Qwen3MoeForCausalLM", "qwen3_moe"),
        Architecture("DeepseekV3ForCausalLM", "deepseek_v3"),
        Architecture("PanguProMoEForCausalLM", "PanguProMoE", shared="shared_expert"),
    )
}


# Before the name of a class that goes out with its code: with a linear before some layers; with
# experts carved out of its MLPs, and perhaps such linears too.
PATCHED, CARVED = "Patched", "Carved"


def architecture_of(fields: Fields) -> Architecture:
    """The class that a config.json names.

    Raises:
        WeightsError: it names none of ours.
    """
    named = fields.get("architectures") or []
    for name in named if isinstance(named, list) else []:
        known = str(name).removeprefix(PATCHED).removeprefix(CARVED)
        if known in ARCHITECTURES:
            return ARCHITECTURES[known]
    raise WeightsError(
        f"config.json names the architecture {named}, known are {', '.join(ARCHITECTURES)}"
    )


def model_of(fields: Fields, name: str) -> tuple[ModelConfig, MoEConfig]:
    """Our description of the model of a config.json, called `name`.

    Raises:
        WeightsError: a field is missing, or asks for what our model does not have.
    """
    kind = architecture_of(fields).name
    _refuse_unsupported(fields)
    try:
        model, moe = _model(fields, kind, name), _routing(fields, kind)
        if carved := fields.get("carved"):
            moe = _carved(model, carved)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"config.json lacks {error}, or holds what is no number") from None
    try:  # types and names, as of any configuration
        typed = from_dict({"model": asdict(model), "moe": asdict(moe)})
    except ConfigError as error:
        raise WeightsError(f"config.json does not describe a model: {error}") from None
    return typed.model, typed.moe


def _refuse_unsupported(fields: Fields) -> None:
    rope, kind = rope_scaling.parameters(fields)
    if kind not in ("default", "yarn", "llama3") or rope.get("truncate", True) is not True:
        raise WeightsError(f"config.json scales its rotary positions ({kind}): not supported")
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    if window and window < fields.get("max_position_embeddings", window):
        raise WeightsError(f"config.json has a sliding window of {window}: not supported")
    if fields.get("mlp_only_layers") or fields.get("decoder_sparse_step", 1) != 1:
        raise WeightsError("config.json has dense layers between its MoE layers: not supported")
    if fields.get("hidden_act", "silu") != "silu":
        raise WeightsError(f"config.json has hidden_act {fields['hidden_act']}: only silu is known")
    if fields.get("quantization_config"):
        raise WeightsError("config.json describes quantised weights: import the model before that")


def _theta(fields: Fields) -> float:
    rope = fields.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0)


def _model(f: Fields, kind: str, name: str) -> ModelConfig:
    heads = f["num_attention_heads"]
    model = ModelConfig(
        name=name,
        num_layers=f["num_hidden_layers"],
        hidden_size=f["hidden_size"],
        num_attention_heads=heads,
        vocab_size=f["vocab_size"],
        ffn_hidden_size=f.get("intermediate_size") or 0,
        num_query_groups=f.get("num_key_value_heads") or heads,
        kv_channels=f.get("head_dim") or f["hidden_size"] // heads,
        max_position_embeddings=f.get("max_position_embeddings", 4096),
        rotary_base=_theta(f),
        norm_epsilon=f.get("rms_norm_eps", 1e-6),
        tie_embeddings=f.get("tie_word_embeddings", False),
        init_std=f.get("initializer_range", 0.02),
        add_qkv_bias=kind == "Qwen2ForCausalLM" or bool(f.get("attention_bias")),
        add_attention_output_bias=kind != "Qwen2ForCausalLM" and bool(f.get("attention_bias")),
        add_mlp_bias=bool(f.get("mlp_bias")),
        patched_layers=list(f.get("patched_layers") or []),
        qk_layernorm=kind in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        **rope_scaling.ours(f, latent=kind == "DeepseekV3ForCausalLM"),
    )
    if kind == "MixtralForCausalLM":
        model.num_experts, model.moe_ffn_hidden_size = (
            f["num_local_experts"],
            f["intermediate_size"],
        )
        model.ffn_hidden_size = 0
    elif kind == "Qwen3MoeForCausalLM":
        model.num_experts = f.get("num_experts") or f["num_local_experts"]
        model.moe_ffn_hidden_size, model.ffn_hidden_size = f["moe_intermediate_size"], 0
    elif kind == "PanguProMoEForCausalLM":
        model.num_experts, model.moe_ffn_hidden_size = f["num_experts"], f["moe_intermediate_size"]
        model.shared_expert_ffn_hidden_size = f["shared_expert_intermediate_size"]
        # The released model has biases on all four projections, and its file does not say so.
        bias = f.get("attention_bias", True)
        model.add_qkv_bias = model.add_attention_output_bias = bias
        model.ffn_hidden_size = 0
    elif kind == "DeepseekV3ForCausalLM":
        _latent(model, f)
    return model


def _latent(model: ModelConfig, f: Fields) -> None:
    width = f["moe_intermediate_size"]
    model.attention, model.qk_layernorm = "mla", True
    model.num_query_groups = model.kv_channels = 0
    model.q_lora_rank, model.kv_lora_rank = f.get("q_lora_rank") or 0, f["kv_lora_rank"]
    model.qk_head_dim, model.qk_pos_emb_head_dim = f["qk_nope_head_dim"], f["qk_rope_head_dim"]
    model.v_head_dim = f["v_head_dim"]
    model.num_experts, model.moe_ffn_hidden_size = f["n_routed_experts"], width
    model.shared_expert_ffn_hidden_size = width * (f.get("n_shared_experts") or 0)
    model.num_dense_layers = f.get("first_k_dense_replace", 0)
    model.mtp_num_layers = f.get("num_nextn_predict_layers") or 0


def _routing(f: Fields, kind: str) -> MoEConfig:
    if kind == "MixtralForCausalLM":
        # softmax over all, the chosen renormalised: the same as softmax over the chosen.
        return MoEConfig("top_k", top_k=f["num_experts_per_tok"], softmax_after_top_k=True)
    if kind == "Qwen3MoeForCausalLM":
        renormalize = bool(f.get("norm_topk_prob", False))
        return MoEConfig("top_k", top_k=f["num_experts_per_tok"], renormalize=renormalize)
    if kind == "PanguProMoEForCausalLM":
        groups = f.get("num_expert_groups", 8)  # the paper's, where the file does not say
        scale = f.get("use_router_scale", True)
        return MoEConfig(
            "moge", top_k=f["num_experts_per_tok"], num_expert_groups=groups, router_scale=scale
        )
    if kind == "DeepseekV3ForCausalLM":
        if f["num_experts_per_tok"] != 2 * f["topk_group"]:
            raise WeightsError(
                "config.json: its class ranks groups by their best 2 experts, the paper and we by "
                f"the best num_experts_per_tok / topk_group: {f['num_experts_per_tok']} must be "
                f"2 x {f['topk_group']}"
            )
        return MoEConfig(
            "group_limited",
            top_k=f["num_experts_per_tok"],
            num_expert_groups=f["n_group"],
            topk_group=f["topk_group"],
            score_function="sigmoid",
            renormalize=bool(f.get("norm_topk_prob", True)),
            scaling_factor=f.get("routed_scaling_factor", 1.0),
            expert_bias=True,
        )
    return MoEConfig()


def _carved(model: ModelConfig, f: Fields) -> MoEConfig:
    """Experts in the place of the MLPs of `model`, and how they are chosen (CMoE)."""
    model.num_experts, model.ffn_hidden_size = f["num_experts"], 0
    model.moe_ffn_hidden_size = f["expert_width"]
    model.shared_expert_ffn_hidden_size = f["shared_width"]
    return MoEConfig(
        "moge" if f["groups"] > 1 else "top_k",
        top_k=f["experts_per_token"],
        num_expert_groups=f["groups"],
        score_function="gated",
        router_scale=True,
        expert_bias=True,
        aux_loss_coefficient=0.0,
    )


def fields_of(config: Config) -> Fields:
    """The config.json of the class that computes what `config` describes.

    Raises:
        WeightsError: no class does; the message names the keys that none has.
    """
    wrong: list[str] = []
    for kind in ARCHITECTURES.values():
        fields = _fields(config, kind)
        try:
            model, moe = model_of(fields, config.model.name)
        except WeightsError:
            continue
        differing = _differences(config, model, moe)
        if not differing:
            return fields
        if not wrong or len(differing) < len(wrong):
            wrong = differing
    raise WeightsError(f"no class of Hugging Face computes this model: see {', '.join(wrong)}")


# What does not change the function of the model in evaluation.
_TRAINING_ONLY = {
    "name", "init", "init_std", "aux_loss_scope", "aux_loss_coefficient", "z_loss_coefficient",
    "expert_bias_update_rate", "capacity_factor", "dispatcher", "dispatch_dtype", "combine_dtype",
    "sandwich_attention_gain", "sandwich_mlp_gain",
    "mtp_loss_scaling_factor",
}  # fmt: skip


def _differences(config: Config, model: ModelConfig, moe: MoEConfig) -> list[str]:
    pairs: list[tuple[str, Any, Any]] = [("model", config.model, model)]
    pairs += [("moe", config.moe, moe)] if config.model.num_experts else []
    return [
        f"{group}.{key}={value}"
        for group, wanted, got in pairs
        for key, value in _normal(wanted).items()
        if key not in _TRAINING_ONLY and value != _normal(got)[key]
    ]


def _normal(part: Any) -> Fields:
    """The values of a group, with the defaults that 0 stands for written out."""
    values = dict(vars(part))
    if "num_attention_heads" in values and values["attention"] == "gqa":
        heads = values["num_attention_heads"]
        values["num_query_groups"] = values["num_query_groups"] or heads
        values["kv_channels"] = values["kv_channels"] or values["hidden_size"] // heads
    if values.get("num_experts") and not values.get("num_dense_layers"):
        values["ffn_hidden_size"] = 0
    if values.get("num_experts") == 0:
        values["moe_ffn_hidden_size"] = values["shared_expert_ffn_hidden_size"] = 0
    if values.get("router") in ("top_k", "expert_choice"):
        values["num_expert_groups"] = 1
    return values


def _fields(config: Config, kind: Architecture) -> Fields:
    model, moe = config.model, config.moe
    carved = bool(model.num_experts) and moe.score_function == "gated"
    own = CARVED if carved else PATCHED if model.patched_layers else ""
    fields: Fields = {
        "architectures": [own + kind.name],
        "model_type": kind.model_type,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "attention_bias": model.add_attention_output_bias,
        "intermediate_size": model.ffn_hidden_size,
        "sliding_window": None,
        "use_cache": True,
    }
    if model.attention == "gqa":
        fields["head_dim"] = model.kv_channels or model.hidden_size // model.num_attention_heads
    if carved:
        fields |= _carved_fields(config)
    elif model.num_experts:
        fields |= _expert_fields(config, kind)
    if model.rope_scaling != "none":
        fields["rope_scaling"] = rope_scaling.theirs(model)
    if model.patched_layers:
        fields["patched_layers"] = list(model.patched_layers)
    if kind.name == "LlamaForCausalLM":
        fields["mlp_bias"] = model.add_mlp_bias
    if kind.name == "DeepseekV3ForCausalLM":
        fields |= {
            "q_lora_rank": model.q_lora_rank or None,
            "kv_lora_rank": model.kv_lora_rank,
            "qk_nope_head_dim": model.qk_head_dim,
            "qk_rope_head_dim": model.qk_pos_emb_head_dim,
            "v_head_dim": model.v_head_dim,
            "first_k_dense_replace": model.num_dense_layers,
            "num_nextn_predict_layers": model.mtp_num_layers,
            "n_group": moe.num_expert_groups,
            "topk_group": moe.topk_group,
        }
        fields["num_key_value_heads"] = model.num_attention_heads
    return fields


def _carved_fields(config: Config) -> Fields:
    model, moe = config.model, config.moe
    shared, width = model.shared_expert_ffn_hidden_size, model.moe_ffn_hidden_size
    carved = {
        "num_experts": model.num_experts,
        "experts_per_token": moe.top_k,
        "groups": moe.equal_groups,
        "expert_width": width,
        "shared_width": shared,
    }
    return {"intermediate_size": shared + model.num_experts * width, "carved": carved}


def _expert_fields(config: Config, kind: Architecture) -> Fields:
    model, moe = config.model, config.moe
    count, width = model.num_experts, model.moe_ffn_hidden_size
    fields = {"num_experts_per_tok": moe.top_k, "moe_intermediate_size": width}
    if kind.name == "MixtralForCausalLM":
        return {**fields, "num_local_experts": count, "intermediate_size": width}
    if kind.name == "DeepseekV3ForCausalLM":
        shared = model.shared_expert_ffn_hidden_size // width
        return {
            **fields,
            "n_routed_experts": count,
            "n_shared_experts": shared,
            "routed_scaling_factor": moe.scaling_factor,
            "norm_topk_prob": moe.renormalize,
            "scoring_func": moe.score_function,
            "topk_method": "noaux_tc",
        }
    fields |= {"num_experts": count, "norm_topk_prob": moe.renormalize, "decoder_sparse_step": 1}
    if kind.name == "PanguProMoEForCausalLM":
        fields |= {
            "shared_expert_intermediate_size": model.shared_expert_ffn_hidden_size,
            "num_expert_groups": moe.num_expert_groups,
            "use_router_scale": moe.router_scale,
        }
    return fields
