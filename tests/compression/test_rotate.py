"""QuaRot's rotation: the float model stays, its outliers do not."""

from dataclasses import replace

import pytest
import torch
from compression.ours import load_ours, logits
from compression.tiny import SETTINGS, compress, saved
from transformers import DeepseekV3Config, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from configs.compose import load
from pangu.checkpoint.tensor_files import Safetensors, WeightsError
from pangu.compression.quantization import rotated
from pangu.weights import prune_layers
from pangu.weights.convert import export_model, import_model
from pangu.weights.model_folder import opened, write
from pangu.weights.rotate import rotated_config, rotated_tensors

SMALL = {**SETTINGS, "num_hidden_layers": 3, "intermediate_size": 64}
DEEPSEEK = DeepseekV3Config(
    **{**SMALL, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2,
    n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, moe_intermediate_size=24,
    n_shared_experts=1, num_nextn_predict_layers=0,
)  # fmt: skip
QWEN = Qwen3MoeConfig(
    **SMALL, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
)
KINDS = {
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "biases": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "experts": QWEN,
    "latent attention": DEEPSEEK,
}
ROWS = torch.arange(2 * 24).view(2, 24) * 7 % 272


def logits_of_ours(path):
    return logits(load_ours(path), ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_rotation_leaves_the_float_model_as_it_is(kind, tmp_path):
    theirs = saved(KINDS[kind], tmp_path)
    before = logits_of_ours(tmp_path / "ours")
    out = rotated(tmp_path / "ours", tmp_path / "rotated")
    assert (logits_of_ours(out) - before).abs().max() <= 1e-4
    one, other = Safetensors(tmp_path / "ours"), Safetensors(out)
    changed = [n for n in one.names() if not torch.equal(one.read(n), other.read(n))]
    assert any("embedding" in name for name in changed)
    assert (other.read("decoder.final_layernorm.weight") == 1).all()
    export_model(out, tmp_path / "out")
    read = type(theirs).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (read(ROWS).logits - before).abs().max() <= 1e-4


def test_a_patch_turns_with_the_stream(tmp_path):
    saved(KINDS["tied"], tmp_path)
    path, config, source = opened(tmp_path / "ours")
    patch = torch.randn(48, 48, generator=torch.Generator().manual_seed(1)) / 7
    after = prune_layers.pruned_config(config, 1, 1, patched=True)
    tensors = prune_layers.pruned_tensors(source, 1, 1, patch)
    write(tmp_path / "patched", after, tensors, made_of=path)
    before = logits_of_ours(tmp_path / "patched")
    assert (
        logits_of_ours(rotated(tmp_path / "patched", tmp_path / "out")) - before
    ).abs().max() <= 1e-4


def test_few_bits_of_activations_with_outliers_want_rotation(tmp_path, capsys):
    """A few channels of the stream are fifty times as large, and norms do not hide it."""
    theirs = saved(LlamaConfig(**SMALL), tmp_path)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[::16] *= 50
    theirs.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "wide")
    plain = logits_of_ours(tmp_path / "wide")
    words = ["quantize", tmp_path / "wide", "--scheme", "W8A4", "--calibration", tmp_path / "text"]
    words += ["--tokens", 128, "--window", 32, "--out"]
    assert compress([*words, tmp_path / "one"]) == 0
    assert compress([*words, tmp_path / "other", "--rotate"]) == 0
    errors = [(logits_of_ours(tmp_path / name) - plain).abs().mean() for name in ("one", "other")]
    assert errors[1] < 0.8 * errors[0]


def test_what_has_no_rotation():
    config = load(["model.sandwich_norm=true"])
    with pytest.raises(WeightsError, match="without sandwich norms"):
        rotated_config(config)
    plain = replace(config, model=replace(config.model, sandwich_norm=False, hidden_size=92))
    with pytest.raises(WeightsError, match="--rotate: no Hadamard matrix of size 92"):
        next(rotated_tensors(plain, Nothing()))


class Nothing:
    def names(self):
        return []
