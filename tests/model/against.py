"""Copies weights of transformers' models into ours."""

from typing import Any

import torch

from configs.compose import load

TINY = [
    "model.vocab_size=64",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_attention_heads=4",
    "model.tie_embeddings=false",
    "train.seq_length=16",
    "backend=cpu",
]


def build(overrides: list[str]) -> Any:
    """One whole model in this process, in evaluation mode."""
    from pangu.model.build import build_model

    chunks, _ = build_model(load([*TINY, *overrides]))
    return chunks[0].eval()


def copy_weights(theirs: Any, ours: Any) -> None:
    """Fill our model with transformers' weights (GQA or MLA, dense or MoE layers)."""
    with torch.no_grad():
        ours.embedding.word_embeddings.weight.copy_(theirs.model.embed_tokens.weight)
        ours.output_layer.weight.copy_(theirs.lm_head.weight)
        ours.decoder.final_layernorm.weight.copy_(theirs.model.norm.weight)
        for source, target in zip(theirs.model.layers, ours.decoder.layers, strict=True):
            target.input_layernorm.weight.copy_(source.input_layernorm.weight)
            target.pre_mlp_layernorm.weight.copy_(source.post_attention_layernorm.weight)
            attention, mlp = source.self_attn, source.mlp
            mla = hasattr(attention, "kv_b_proj")
            (_copy_mla if mla else _copy_gqa)(attention, target.self_attention)
            (_copy_experts if hasattr(mlp, "experts") else _copy_mlp)(mlp, target.mlp)


def _copy_gqa(source: Any, target: Any) -> None:
    size = source.head_dim
    groups = source.k_proj.weight.size(0) // size
    parts = [
        part.weight.view(groups, -1, part.weight.size(1))
        for part in (source.q_proj, source.k_proj, source.v_proj)
    ]
    target.linear_qkv.weight.copy_(torch.cat(parts, dim=1).flatten(0, 1))
    target.linear_proj.weight.copy_(source.o_proj.weight)
    if hasattr(source, "q_norm"):
        target.q_layernorm.weight.copy_(source.q_norm.weight)
        target.k_layernorm.weight.copy_(source.k_norm.weight)


def _copy_mla(source: Any, target: Any) -> None:
    target.linear_q_down_proj.weight.copy_(source.q_a_proj.weight)
    target.q_layernorm.weight.copy_(source.q_a_layernorm.weight)
    target.linear_q_up_proj.weight.copy_(source.q_b_proj.weight)
    target.linear_kv_down_proj.weight.copy_(source.kv_a_proj_with_mqa.weight)
    target.kv_layernorm.weight.copy_(source.kv_a_layernorm.weight)
    target.linear_kv_up_proj.weight.copy_(source.kv_b_proj.weight)
    target.linear_proj.weight.copy_(source.o_proj.weight)


def _copy_mlp(source: Any, target: Any) -> None:
    gate_up = torch.cat([source.gate_proj.weight, source.up_proj.weight])
    target.linear_fc1.weight.copy_(gate_up)
    target.linear_fc2.weight.copy_(source.down_proj.weight)


def _copy_experts(source: Any, target: Any) -> None:
    target.router.weight.copy_(source.gate.weight)
    if hasattr(source.gate, "e_score_correction_bias"):
        target.router.expert_bias.copy_(source.gate.e_score_correction_bias)
    w1 = source.experts.gate_up_proj.transpose(1, 2)  # [E, H, gate and up]
    target.experts.w1.copy_(w1.unflatten(2, (2, -1)))
    target.experts.w2.copy_(source.experts.down_proj.transpose(1, 2))
    if hasattr(source, "shared_experts"):
        _copy_mlp(source.shared_experts, target.shared_experts)


def logits_and_input_gradient(forward: Any, embedding: torch.nn.Parameter) -> list[torch.Tensor]:
    """Logits `[batch, seq, vocab]` and the gradient of a weighted sum of them at the input
    embeddings, for fixed tokens that are all different."""
    tokens = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:32].view(2, 16)
    logits = forward(tokens)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    (logits * weights.to(logits.dtype)).sum().backward()
    assert embedding.grad is not None
    return [logits.detach(), embedding.grad[tokens]]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()
