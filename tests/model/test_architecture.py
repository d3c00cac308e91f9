"""What the presets add to a plain transformer: counts, norms, initial values, MTP."""

import math

import pytest
import torch
from against import build
from gloo import single
from layouts import steps

from configs.compose import load
from simulator.parameters import count_parameters

SMALL = ["model.num_layers=3", "model.hidden_size=32", "model.vocab_size=64", "backend=cpu"]
GQA = ["model.num_attention_heads=4", "model.num_query_groups=2", "model.kv_channels=8"]
MLA = [
    "model.num_attention_heads=4",
    "model.q_lora_rank=16",
    "model.kv_lora_rank=12",
    "model.qk_head_dim=8",
    "model.qk_pos_emb_head_dim=4",
    "model.v_head_dim=6",
]
EXPERTS = ["model.num_experts=16", "model.moe_ffn_hidden_size=24"]
ULTRA = [
    "model=pangu_ultra_moe",
    *MLA,
    *EXPERTS,
    "model.num_dense_layers=1",
    "model.ffn_hidden_size=48",
    "model.shared_expert_ffn_hidden_size=24",
]
PRESETS = {
    "moge_tiny": [*GQA, *EXPERTS],
    "pangu_pro_moe": [*GQA, *EXPERTS, "model.shared_expert_ffn_hidden_size=48"],
    "pangu_ultra_moe": ULTRA,
    "pangu_ultra_dense": [*GQA, "model.ffn_hidden_size=48"],
    "mixtral_8x7b": [*GQA, *EXPERTS],
    "qwen3_30b_a3b": [*GQA, *EXPERTS],
    "deepseek_v3": [*ULTRA, "model=deepseek_v3"],
}


def model_of(preset, *extra):
    single()
    rest = [line for line in PRESETS[preset] if not line.startswith("model=")]
    overrides = [f"model={preset}", *SMALL, *rest]
    return build([*overrides, f"model.tie_embeddings={preset == 'moge_tiny'}", *extra])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_simulator_counts_what_the_trainer_builds(preset):
    model = model_of(preset)
    rest = [line for line in PRESETS[preset] if not line.startswith("model=")]
    config = load(
        [
            f"model={preset}",
            *SMALL,
            *rest,
            f"model.tie_embeddings={model.share_embeddings_and_output_weights}",
        ]
    )
    built = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(config).allocated == built


def test_sandwich_norms_start_scaled_with_depth():
    layer = model_of("pangu_ultra_moe").decoder.layers[1]
    for residual, gain in ((layer.self_attn_bda, 0.283), (layer.mlp_bda, 0.432)):
        weight = residual.norm.weight
        torch.testing.assert_close(weight, torch.full((32,), gain / math.sqrt(3)))


def test_a_sandwiched_layer_normalises_what_it_adds():
    """h ← h + Norm(g, f(Norm(h))): with gain g, what is added has a root mean square of g."""
    model = model_of("pangu_ultra_moe", "model.mtp_num_layers=0", "model.norm_epsilon=1e-12")
    layer = model.decoder.layers[0]
    seen = []
    layer.self_attn_bda.norm.register_forward_hook(lambda _, args, out: seen.append(out))
    model(torch.arange(16).view(1, 16), torch.arange(16).view(1, 16), None)
    rms = seen[0].square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.283 / math.sqrt(3)), rtol=1e-3, atol=0)


def test_initial_values_have_the_scheme_s_spread():
    tiny = model_of("pangu_ultra_moe")
    std = math.sqrt(1 / (2 * 32 * 3))
    assert tiny.decoder.layers[2].mlp.experts.w2.std().item() == pytest.approx(std, rel=0.03)
    assert tiny.embedding.word_embeddings.weight.std().item() == pytest.approx(0.5, rel=0.05)
    normal = model_of("mixtral_8x7b")
    assert normal.decoder.layers[2].mlp.experts.w1.std().item() == pytest.approx(0.02, rel=0.03)
    down = normal.decoder.layers[2].mlp.experts.w2.std().item()
    assert down == pytest.approx(0.02 / math.sqrt(6), rel=0.03)


def test_multi_token_prediction_adds_its_gradient():
    """With MTP the main loss is the same, and the embedding gets more gradient."""
    single()
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    common = ["model=pangu_ultra_moe", *ULTRA[1:], "train.global_batch_size=2"]
    common += ["moe.top_k=2", "moe.num_expert_groups=1"]
    with_mtp = steps([*common, "model.mtp_num_layers=1"], 1, 2)
    without = steps([*common, "model.mtp_num_layers=0"], 1, 2)
    assert with_mtp[0][0] == pytest.approx(without[0][0], rel=1e-6)
    assert with_mtp[0][1] > without[0][1] * 1.0001
