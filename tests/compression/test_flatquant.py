"""FlatQuant's transforms against dense products in numpy: they leave the float model as it is, and
after learning few bits lose less than with a rotation, or with nothing."""

import numpy as np
import pytest
import torch
from compression.ours import logits
from compression.tiny import SETTINGS, compress, saved
from gloo import single
from transformers import DeepseekV3Config, LlamaConfig, Qwen3MoeConfig

from configs.compose import read_file
from pangu.checkpoint import restore
from pangu.checkpoint.tensor_files import Safetensors, WeightsError
from pangu.model.build import build_model
from pangu.ops.input_transform import factors, kronecker, round_within
from pangu.ops.rounded_linear import round_tokens
from pangu.trained_model import read_run_config
from pangu.weights import flatquant
from pangu.weights.convert import export_model
from pangu.weights.quantize import Scheme
from pangu.weights.quantize_layers import Quantizer

ROWS = torch.arange(2 * 24).view(2, 24) * 7 % 272
SMALL = {**SETTINGS, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
KINDS = {
    "dense": LlamaConfig(**SMALL),
    "experts": Qwen3MoeConfig(
        **SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "latent attention": DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, moe_intermediate_size=24,
        n_shared_experts=1, num_nextn_predict_layers=0,
    ),
}  # fmt: skip


def test_the_product_of_two_small_matrices_is_a_dense_one():
    assert [factors(size) for size in (576, 1536, 48, 7)] == [(24, 24), (32, 48), (6, 8), (1, 7)]
    generator = np.random.default_rng(0)
    x, left, right = (generator.normal(size=s) for s in ((5, 3, 48), (6, 6), (8, 8)))
    found = kronecker(*map(torch.from_numpy, (x, left, right)))
    assert np.allclose(found.numpy(), x @ np.kron(left, right), atol=1e-12)


def test_rounding_within_a_part_of_the_largest():
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * 5
    x[2] = 0
    assert torch.allclose(round_within(x, 4, torch.ones(())), round_tokens(x, 4), atol=1e-6)
    part, wide = 0.6, x.double().numpy()
    step = np.where((most := np.abs(wide).max(1, keepdims=True) * part / 7) > 0, most, 1)
    expected = np.clip(np.round(wide / step), -7, 7) * step
    found = round_within(x, 4, torch.tensor(part))
    assert np.allclose(found.numpy(), expected, atol=1e-5)
    inside, y = torch.tensor(part, requires_grad=True), x[0].clone().requires_grad_()
    round_within(y, 4, inside).sum().backward()
    clipped = (y.abs() > part * y.abs().max()).detach()
    assert clipped.any()
    assert inside.grad != 0
    most = y.detach().abs().argmax()  # the largest moves the steps of all
    assert (y.grad[clipped & (torch.arange(32) != most)] == 0).all()
    assert (y.grad[~clipped] == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_without_rounding_the_model_stays(kind, tmp_path, monkeypatch):
    """With scales, turns and their inverses in float64, all of them learned for a step."""
    saved(KINDS[kind], tmp_path)
    config = read_run_config(tmp_path / "ours")
    config.backend.precision, config.model.input_transforms = "fp64", True
    single()
    chunks, _ = build_model(config)
    restore.load_model(tmp_path / "ours", chunks)
    before = logits(chunks[0].eval(), ROWS)
    monkeypatch.setattr(flatquant._Flat, "_rounded", lambda _, rows, parts: (rows, Quiet(parts)))
    monkeypatch.setattr(flatquant, "smooth_scales", lambda _, most, __: 0.5 + torch.rand_like(most))
    old = {name: t.clone() for name, t in chunks[0].state_dict().items() if torch.is_tensor(t)}
    Quantizer("flatquant", Scheme("", 4, 0, 8), torch.float32, 1).run(chunks[0], list(ROWS))
    now = chunks[0].state_dict()
    changed = [name for name, tensor in old.items() if not torch.equal(now[name], tensor)]
    for part in ("linear_proj.weight", "input_layernorm.weight", "experts.w2", "router.weight"):
        assert {name for name in old if name.endswith(part)} <= set(changed)
    assert any(name.endswith("linear_proj.input_rounding.left") for name in changed)
    assert (logits(chunks[0], ROWS) - before).abs().max() <= 1e-5 * before.abs().max()


class Quiet:
    """Grids that nobody reads."""

    def __init__(self, parts):
        self.scale = self.zero = parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model whose channels have outliers, in the stream and between the MLP's matrices."""
    folder = tmp_path_factory.mktemp("flatquant")
    saved(KINDS["dense"], folder)
    return folder


def quantise(folder, out, *options):
    words = ["quantize", folder / "ours", "--scheme", "W4A4", "--group-size", 32, "--out", out]
    words += ["--calibration", folder / "text", "--tokens", 256, "--window", 32, *options]
    return compress(words)


def test_what_cannot_be_made_of_it(folder, tmp_path, capsys):
    assert quantise(folder, tmp_path / "small", "--method", "flatquant", "--epochs", 1) == 0
    config = read_file(tmp_path / "small" / "config.yaml", "model")
    assert (config.model.input_transforms, config.model.activation_bits) == (True, 4)
    names = Safetensors(tmp_path / "small").names()
    assert "decoder.layers.1.mlp.linear_fc2.input_rounding.left" in names
    with pytest.raises(WeightsError, match="compressed-tensors has no transform"):
        export_model(tmp_path / "small", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Without its codes, as a run that trained it on would leave it, it is turned all the same.
    (tmp_path / "small" / "quantization.safetensors").unlink()
    words = ["quantize", tmp_path / "small", "--scheme", "W8A16", "--out", tmp_path / "out"]
    assert compress([*words, "--calibration", folder / "text"]) == 2
    assert "has model.input_transforms of a quantised model" in " ".join(
        capsys.readouterr().err.split()
    )
