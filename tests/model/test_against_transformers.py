"""Our model equals transformers' Llama, Mixtral, Qwen3-MoE and DeepSeek-V3, weights copied."""

import pytest
import torch
from against import build, copy_weights, logits_and_input_gradient, relative_error
from gloo import single
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
DENSE = ["model.norm_epsilon=1e-6", "model.rotary_base=10000"]


def rope(theta: float) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def llama():
    theirs = LlamaForCausalLM(
        LlamaConfig(**COMMON, intermediate_size=48, num_key_value_heads=2, **rope(10000.0))
    )
    return theirs, [
        *DENSE,
        "model.num_experts=0",
        "model.ffn_hidden_size=48",
        "model.num_query_groups=2",
        "model.kv_channels=8",
    ]


def mixtral():
    theirs = MixtralForCausalLM(
        MixtralConfig(
            **COMMON,
            intermediate_size=48,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            **rope(1e6),
        )
    )
    return theirs, [
        "model=mixtral_8x7b",
        "model.norm_epsilon=1e-6",
        "model.num_query_groups=2",
        "model.kv_channels=8",
        "model.num_experts=8",
        "model.moe_ffn_hidden_size=48",
    ]


def qwen3_moe():
    theirs = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **COMMON,
            num_key_value_heads=2,
            head_dim=12,
            num_experts=8,
            moe_intermediate_size=24,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            **rope(1e6),
        )
    )
    return theirs, [
        "model=qwen3_30b_a3b",
        "model.num_query_groups=2",
        "model.kv_channels=12",
        "model.num_experts=8",
        "model.moe_ffn_hidden_size=24",
        "moe.top_k=4",
    ]


def deepseek_v3():
    theirs = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **COMMON,
            intermediate_size=48,
            num_key_value_heads=4,
            n_routed_experts=8,
            moe_intermediate_size=24,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            q_lora_rank=16,
            kv_lora_rank=12,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=6,
            **rope(10000.0),
        )
    )
    for layer in theirs.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.data.copy_(torch.linspace(-0.3, 0.3, 8))
    return theirs, [
        "model=deepseek_v3",
        "model.ffn_hidden_size=48",
        "model.num_dense_layers=1",
        "model.num_experts=8",
        "model.moe_ffn_hidden_size=24",
        "model.shared_expert_ffn_hidden_size=24",
        "model.q_lora_rank=16",
        "model.kv_lora_rank=12",
        "model.qk_head_dim=8",
        "model.qk_pos_emb_head_dim=4",
        "model.v_head_dim=6",
        "model.mtp_num_layers=0",
        "moe.top_k=4",
        "moe.num_expert_groups=4",
        "moe.topk_group=2",
    ]


@pytest.mark.parametrize("model", [llama, mixtral, qwen3_moe, deepseek_v3])
def test_logits_and_input_gradients(model):
    single()
    torch.manual_seed(0)
    theirs, overrides = model()
    ours = build(overrides)
    copy_weights(theirs.eval(), ours)
    expected = logits_and_input_gradient(
        lambda tokens: theirs(tokens).logits, theirs.model.embed_tokens.weight
    )
    positions = torch.arange(16).expand(2, 16)
    found = logits_and_input_gradient(
        lambda tokens: ours(tokens, positions, None), ours.embedding.word_embeddings.weight
    )
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    print(model.__name__, errors)
    assert max(errors) < 1e-5
