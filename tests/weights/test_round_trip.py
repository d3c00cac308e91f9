"""In and out of Hugging Face's format, for tiny random models of every class, against transformers
itself: logits of ours equal theirs, and what goes out is what came in, to the last bit."""

import json
from dataclasses import replace
from pathlib import Path

import checkpoint_runs
import gloo
import pytest
import torch
from gloo import single
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from configs.compose import load, read_file
from configs.schema import LaunchConfig, ParallelConfig
from pangu.checkpoint import restore
from pangu.checkpoint.tensor_files import Safetensors, WeightsError
from pangu.model.build import build_model
from pangu.weights.architectures import fields_of
from pangu.weights.convert import export_model, import_model

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Short enough for the tests' tokens to lie beyond it, at a base where some pairs turn slowly.
SCALED = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
CLASSES = {
    "llama": LlamaConfig(**COMMON),
    "llama_tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama_biased": LlamaConfig(**COMMON, attention_bias=True),
    "qwen2": Qwen2Config(**COMMON, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": Qwen3Config(**COMMON, head_dim=12),
    "llama_3.1": LlamaConfig(
        **COMMON,
        rope_parameters={
            **SCALED,
            "rope_type": "llama3",
            "low_freq_factor": 0.5,
            "high_freq_factor": 2.0,
        },
    ),
    "llama_yarn": LlamaConfig(**COMMON, rope_parameters={**SCALED, "rope_type": "yarn"}),
    "qwen2_yarn": Qwen2Config(
        **COMMON,
        rope_parameters={
            **SCALED,
            "rope_type": "yarn",
            "beta_fast": 2.0,
            "beta_slow": 0.5,
            "attention_factor": 0.8,
        },
    ),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, **EXPERTS, num_experts=8, head_dim=12),
    "qwen3_moe_renormalized": Qwen3MoeConfig(
        **COMMON, **EXPERTS, num_experts=8, head_dim=8, norm_topk_prob=True
    ),
    "deepseek_v3": DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        moe_intermediate_size=24,
        num_experts_per_tok=4,
        n_routed_experts=8,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        num_nextn_predict_layers=0,
    ),
}


def save_theirs(name: str, folder: Path, dtype: torch.dtype = torch.float32):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CLASSES[name], attn_implementation="eager")
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith(("norm.weight", "layernorm.weight", "bias")):
                value.copy_(1 + 0.1 * torch.randn_like(value))
    model = model.eval().to(dtype)
    model.save_pretrained(folder)
    return model


def one_process(config):
    return replace(config, parallel=ParallelConfig(), launch=LaunchConfig())


def load_ours(folder: Path, config=None):
    single()
    chunks, _ = build_model(config or read_file(folder / "config.yaml", "model"))
    restore.load_model(folder, chunks)
    return chunks[0].eval()


CLASSES["deepseek_v3_yarn"] = DeepseekV3Config(
    **{
        **CLASSES["deepseek_v3"].to_diff_dict(),
        "rope_parameters": {
            **SCALED,
            "rope_type": "yarn",
            "beta_fast": 2.0,
            "beta_slow": 0.5,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
        },
    }
)


TOKENS = torch.arange(2 * 24).view(2, 24) * 7 % 64


def logits_of_ours(model):
    with torch.no_grad():
        return model(TOKENS, torch.arange(24).expand(2, 24), None)


@pytest.mark.parametrize("name", CLASSES)
def test_in_and_out(name, tmp_path):
    theirs = save_theirs(name, tmp_path / "theirs")
    config = import_model(tmp_path / "theirs", tmp_path / "ours")
    assert (config.model.rope_scaling == "none") == ("yarn" not in name and "3.1" not in name)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    found = logits_of_ours(load_ours(tmp_path / "ours"))
    assert (found - expected).abs().max() <= 1e-4
    assert expected.std() > 0.1  # not a model of zeros

    export_model(tmp_path / "ours", tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again.eval()(TOKENS).logits, expected)
    before, after = Safetensors(tmp_path / "theirs"), Safetensors(tmp_path / "back")
    assert set(before.names()) == set(after.names())
    for key in before.names():
        assert torch.equal(before.read(key), after.read(key)), key


def test_bfloat16_stays_and_every_bit_of_it(tmp_path):
    save_theirs("qwen3_moe", tmp_path / "theirs", torch.bfloat16)
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back")
    before, after = Safetensors(tmp_path / "theirs"), Safetensors(tmp_path / "back")
    for key in before.names():
        assert after.read(key).dtype is torch.bfloat16
        assert torch.equal(before.read(key), after.read(key)), key


def test_experts_in_one_tensor_per_layer_are_read_too(tmp_path):
    """As transformers 5 holds them in memory, and as some files have them."""
    theirs = save_theirs("qwen3_moe", tmp_path / "theirs")
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "config.json").write_text((tmp_path / "theirs/config.json").read_text())
    held = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    assert any(key.endswith("experts.gate_up_proj") for key in held)
    save_file(held, tmp_path / "fused" / "model.safetensors")
    import_model(tmp_path / "theirs", tmp_path / "a")
    import_model(tmp_path / "fused", tmp_path / "b")
    one, other = Safetensors(tmp_path / "a"), Safetensors(tmp_path / "b")
    assert all(torch.equal(one.read(key), other.read(key)) for key in one.names())


def pangu_pro(folder: Path) -> dict[str, torch.Tensor]:
    """A tiny model under the names and shapes of the released Pangu Pro MoE."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    hidden, experts, width = 32, 8, 12
    tensors = {"model.embed_tokens.weight": draw(64, hidden), "lm_head.weight": draw(64, hidden)}
    tensors["model.norm.weight"] = 1 + draw(hidden)
    for layer in range(2):
        p = f"model.layers.{layer}."
        for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16), ("o_proj", 32)):
            tensors[f"{p}self_attn.{name}.weight"] = draw(rows, 32)
            tensors[f"{p}self_attn.{name}.bias"] = draw(rows)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{p}{name}.weight"] = 1 + draw(hidden)
        tensors[f"{p}mlp.gate.weight"] = draw(experts, hidden)
        tensors[f"{p}mlp.router_scale"] = 1 + draw(1, experts)
        parts = [(f"experts.{e}.", width) for e in range(experts)] + [("shared_expert.", 20)]
        for part, size in parts:
            tensors[f"{p}mlp.{part}gate_proj.weight"] = draw(size, hidden)
            tensors[f"{p}mlp.{part}up_proj.weight"] = draw(size, hidden)
            tensors[f"{p}mlp.{part}down_proj.weight"] = draw(hidden, size)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    fields = {
        **COMMON,
        "architectures": ["PanguProMoEForCausalLM"],
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "num_expert_groups": 4,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": 20,
        "rope_theta": 1.6e7,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return tensors


def pangu_pro_logits(
    w: dict[str, torch.Tensor], tokens: torch.Tensor, members: int = 2
) -> torch.Tensor:
    """The released model's function in plain torch (arXiv 2505.21411, section 2.1): softmax over
    all experts, the best of each group's `members`, weights times the learned scale, a shared
    expert beside."""

    def norm(x, gain):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * gain

    def mlp(x, p):
        gate = torch.nn.functional.silu(x @ w[f"{p}gate_proj.weight"].T)
        return (gate * (x @ w[f"{p}up_proj.weight"].T)) @ w[f"{p}down_proj.weight"].T

    batch, seq = tokens.shape
    angles = torch.arange(seq)[:, None] / 1.6e7 ** (torch.arange(0, 8, 2) / 8)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def rotate(x):
        halves = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * cos + halves * sin

    h = w["model.embed_tokens.weight"][tokens]
    for layer in range(2):
        p = f"model.layers.{layer}."
        x = norm(h, w[f"{p}input_layernorm.weight"])

        def project(name, x=x, p=p):
            y = x @ w[f"{p}self_attn.{name}.weight"].T + w[f"{p}self_attn.{name}.bias"]
            return y.view(batch, seq, -1, 8).transpose(1, 2)

        q, k, v = rotate(project("q_proj")), rotate(project("k_proj")), project("v_proj")
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.transpose(-1, -2) / 8**0.5
        mask = torch.full((seq, seq), float("-inf")).triu(1)
        y = ((scores + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = h + y @ w[f"{p}self_attn.o_proj.weight"].T + w[f"{p}self_attn.o_proj.bias"]
        x = norm(h, w[f"{p}post_attention_layernorm.weight"])
        scores = (x @ w[f"{p}mlp.gate.weight"].T).softmax(-1)
        best = scores.unflatten(-1, (4, members)).argmax(-1)  # one in each of four groups
        out = mlp(x, f"{p}mlp.shared_expert.")
        for group in range(4):
            for member in range(members):
                expert = members * group + member
                weight = scores[..., expert] * w[f"{p}mlp.router_scale"][0, expert]
                weight = weight * (best[..., group] == member)
                out = out + weight[..., None] * mlp(x, f"{p}mlp.experts.{expert}.")
        h = h + out
    return norm(h, w["model.norm.weight"]) @ w["lm_head.weight"].T


def test_pangu_pro_under_its_released_names(tmp_path):
    tensors = pangu_pro(tmp_path / "theirs")
    config = import_model(tmp_path / "theirs", tmp_path / "ours")
    assert (config.moe.router, config.moe.num_expert_groups) == ("moge", 4)
    found = logits_of_ours(load_ours(tmp_path / "ours"))
    assert (found - pangu_pro_logits(tensors, TOKENS)).abs().max() <= 1e-4
    export_model(tmp_path / "ours", tmp_path / "back")
    back = Safetensors(tmp_path / "back")
    assert set(back.names()) == set(tensors)
    assert all(torch.equal(back.read(key), value) for key, value in tensors.items())


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.expert_model_parallel_size=2"],
        ["parallel.pipeline_model_parallel_size=2", "parallel.zero_stage=0"],
        ["parallel.tensor_model_parallel_size=2"],
    ],
)
def test_what_two_ranks_trained_goes_out_whole(layout, tmp_path):
    """Every expert of every rank, in its place: logits of the exported model in plain torch are
    those of the run's own checkpoint, read by one process."""
    overrides = ["train.steps=2", "model.add_qkv_bias=true", "model.num_layers=2"]
    overrides += ["model.add_attention_output_bias=true", "model.tie_embeddings=false", *layout]
    overrides += ["moe.renormalize=false"]  # Pangu Pro's class does not divide
    gloo.run(2, checkpoint_runs.train, tmp_path / "run", overrides)
    export_model(tmp_path / "run", tmp_path / "out")
    config = read_file(tmp_path / "run" / "config.yaml", "model")
    ours = load_ours(tmp_path / "run" / "checkpoints" / "step_00000002", one_process(config))
    import_model(tmp_path / "out", tmp_path / "back")
    back = load_ours(tmp_path / "back")
    assert torch.equal(logits_of_ours(back), logits_of_ours(ours))
    theirs = Safetensors(tmp_path / "out")
    for number, layer in enumerate(ours.decoder.layers):
        for expert in range(8):
            name = f"model.layers.{number}.mlp.experts.{expert}.up_proj.weight"
            assert torch.equal(theirs.read(name), layer.mlp.experts.w1[expert, :, 1].t())


def test_a_model_that_no_class_computes_is_refused():
    config = load(["model.sandwich_norm=true"])
    with pytest.raises(WeightsError, match=r"model\.sandwich_norm=True"):
        fields_of(config)
