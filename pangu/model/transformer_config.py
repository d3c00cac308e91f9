"""From the configuration tree to megatron-core's TransformerConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from configs.dispatch import resolved
from configs.layout import Part, is_even, stage_parts
from configs.schema import Config, ModelConfig
from pangu import backends
from pangu.moe.config import MoETransformerConfig


@dataclass
class PanguTransformerConfig(MoETransformerConfig):
    """megatron-core's configuration, with the parts of our tree that our modules read."""

    model: ModelConfig | None = None


def transformer_config(config: Config) -> PanguTransformerConfig:
    """Translate a checked configuration.

    Gradients are sums over tokens, divided once by the number of tokens in the global batch
    (`calculate_per_token_loss`): only then does the gradient not depend on how the batch is split.
    """
    model = config.model
    dtype = backends.torch_dtype(config.backend.precision)
    heads = model.num_attention_heads
    moe = replace(config.moe, dispatcher=resolved(config)) if model.num_experts else config.moe
    if config.train.leap_heads_only or model.lora_rank:  # the balancing bias keeps its bits too
        moe = replace(moe, expert_bias_update_rate=0.0)
    settings = PanguTransformerConfig(
        model=model,
        moe=moe,
        activation_bits=model.activation_bits,
        input_transforms=model.input_transforms,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        lora_modules=frozenset(model.lora_modules if model.lora_rank else ()),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size or model.moe_ffn_hidden_size,
        num_attention_heads=heads,
        # MLA has a key for every head, and the engine sizes its cache by this.
        num_query_groups=heads if model.attention == "mla" else model.num_query_groups or heads,
        kv_channels=model.kv_channels or model.hidden_size // heads,
        layernorm_epsilon=model.norm_epsilon,
        normalization=model.normalization,
        qk_layernorm=model.qk_layernorm,
        add_bias_linear=model.add_mlp_bias,
        add_qkv_bias=model.add_qkv_bias,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=F.silu if model.activation == "swiglu" else F.gelu,
        bias_activation_fusion=model.activation == "swiglu",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Values are set afterwards, by name (pangu.model.init): the same in every layout.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        embedding_init_method_std=1.0,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        rotary_base=model.rotary_base,
        rope_type="rope",
        mtp_num_layers=model.mtp_num_layers or None,
        mtp_loss_scaling_factor=model.mtp_loss_scaling_factor,
        deallocate_pipeline_outputs=backends.current().sends_in_stream_order,
        **_latent_attention(model),
        **_experts(config),
        **_parallel(config),
        **_recompute(config),
    )
    # Given to the constructor it is refused for what the engine's own passes cannot do.
    settings.overlap_moe_expert_parallel_comm = config.parallel.overlap_expert_parallel
    return settings


def _leave_as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _latent_attention(model: ModelConfig) -> dict[str, Any]:
    if model.attention != "mla":
        return {"multi_latent_attention": False}
    return {
        "multi_latent_attention": True,
        "q_lora_rank": model.q_lora_rank or None,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_head_dim,
        "qk_pos_emb_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
        "softmax_scale": 1.0 / math.sqrt(model.qk_head_dim + model.qk_pos_emb_head_dim),
    }


def _experts(config: Config) -> dict[str, Any]:
    model, moe = config.model, config.moe
    if not model.num_experts:
        return {}
    dense = model.num_dense_layers
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.shared_expert_ffn_hidden_size or None,
        "moe_layer_freq": [0] * dense + [1] * (model.num_layers - dense),
        "moe_router_topk": moe.top_k,
        # pangu.moe has its own losses. This name makes the engine tell the routers at the end of
        # each global batch.
        "moe_router_load_balancing_type": "global_aux_loss",
        # The engine would move the bias before it is known whether the step is skipped.
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": moe.score_function,
        "moe_router_pre_softmax": not moe.softmax_after_top_k,
        "moe_token_dispatcher_type": "alltoall",  # pangu.moe builds its own dispatcher
        "moe_grouped_gemm": True,
    }


def _parallel(config: Config) -> dict[str, Any]:
    p = config.parallel
    tensor, virtual = p.tensor_model_parallel_size, p.virtual_pipeline_model_parallel_size
    return {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": p.sequence_parallel and tensor > 1,
        "pipeline_model_parallel_size": p.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "pipeline_model_parallel_layout": _pipeline_layout(config),
        # Two ranks exchange in both directions at once when chunks interleave over PP 2: batched
        # sends would be matched in the wrong order.
        "overlap_p2p_comm": virtual > 1,
        "batch_p2p_comm": virtual == 1,
        "context_parallel_size": p.context_parallel_size,
        "expert_model_parallel_size": p.expert_model_parallel_size,
        "expert_tensor_parallel_size": p.expert_tensor_parallel_size,
    }


def _pipeline_layout(config: Config) -> list[list[Part]] | None:
    """megatron-core's layout of uneven stages: the names of each virtual stage's parts."""
    if config.parallel.pipeline_model_parallel_size == 1 or is_even(config):
        return None
    return stage_parts(config)


def _recompute(config: Config) -> dict[str, Any]:
    memory = config.memory
    if memory.recompute_granularity == "none":
        return {}
    if memory.recompute_granularity == "selective":
        return {
            "recompute_granularity": "selective",
            # megatron-core refuses names that are not its own.
            "recompute_modules": [
                name for name in memory.recompute_modules if name not in ("moe_fc1", "moe_permute")
            ],
            "recomputed": frozenset(memory.recompute_modules),
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": memory.recompute_method,
        "recompute_num_layers": memory.recompute_num_layers,
    }
