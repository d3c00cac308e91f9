"""Quantisation against compressed-tensors' own arithmetic, plain numpy, and transformers reading
what was exported."""

import json

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from compression.ours import load_ours, logits
from compression.tiny import SETTINGS, compress, llama, saved
from drills.quantize import Way, tried, ways
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Qwen3MoeConfig

from configs.compose import load, read_file
from pangu.checkpoint import restore
from pangu.checkpoint.tensor_files import Safetensors, WeightsError
from pangu.model.build import build_model
from pangu.weights.architectures import ARCHITECTURES
from pangu.weights.compressed_tensors import description, packed
from pangu.weights.convert import export_model
from pangu.weights.gptq import gptq
from pangu.weights.quantize import Scheme, codes_of, grid_of, rounded, scheme_of
from pangu.weights.smoothing import awq_scales, smooth_scales

DEQUANTISED = CompressedTensorsConfig(dequantize=True)
ROWS = torch.arange(2 * 24).view(2, 24) * 7 % 272


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["W2A16", "W3A16", "W4A16", "W8A16", "W4A16_ASYM"])
def test_nearest_rounding_is_that_of_compressed_tensors(name):
    weight = draw(24, 96) * draw(24, 1, seed=1)
    scheme = scheme_of(name, 32, {96})
    groups = weight.unflatten(1, (-1, scheme.group_size or 96))
    args = QuantizationArgs(
        num_bits=scheme.weight_bits,
        symmetric=scheme.symmetric,
        strategy="group" if scheme.group_size else "channel",
        group_size=scheme.group_size or None,
    )
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    expected = fake_quantize(weight, scale, zero, args)
    grid = grid_of(weight, scheme, torch.float32)
    assert torch.allclose(grid.scale, scale, rtol=1e-6)
    assert torch.equal(grid.zero, zero.float())
    assert torch.allclose(rounded(weight, grid, scheme), expected, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("columns", [31, 32, 64, 100])
def test_packing_is_that_of_compressed_tensors(bits, columns):
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (5, columns), generator=generator).to(torch.int8)
    assert torch.equal(packed(codes, bits), pack_to_int32(codes, bits))
    turned = packed(codes.T.contiguous().T.T, bits).T.contiguous()
    assert torch.equal(turned, pack_to_int32(codes, bits, packed_dim=0))


def one_column_at_a_time(weight, gram, grid, limits, damp):
    """Optimal brain quantisation in numpy: the inverse is updated after every column."""
    weight, hessian = weight.double().numpy().copy(), gram.double().numpy().copy()
    count = len(hessian)
    hessian += damp * np.diag(hessian).mean() * np.eye(count)
    scale, zero = (part.double().numpy() for part in grid.columns(count))
    inverse, left = np.linalg.inv(hessian), np.argsort(-np.diag(hessian), kind="stable").tolist()
    out = np.empty_like(weight)
    while left:
        q = left.pop(0)
        codes = np.clip(np.round(weight[:, q] / scale[:, q] + zero[:, q]), *limits)
        out[:, q] = (codes - zero[:, q]) * scale[:, q]
        error = (weight[:, q] - out[:, q]) / inverse[q, q]
        weight -= np.outer(error, inverse[q])
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return out


@pytest.mark.parametrize(("columns", "bits"), [(48, 4), (160, 3)])
def test_gptq_is_optimal_brain_quantisation(columns, bits):
    scheme = Scheme("", bits, 0, 16, symmetric=bits == 4)
    weight, x = draw(12, columns), draw(400, columns, seed=1) @ draw(columns, columns, seed=2)
    gram = x.T @ x
    found, grid = gptq(weight, gram, scheme, torch.float32)
    expected = one_column_at_a_time(weight, gram, grid, scheme.limits, 0.01)
    # A code that lies half-way may fall to either side; nearly all must agree.
    same = np.abs(found.numpy() - expected) < 1e-4
    assert same.mean() > 0.995
    assert torch.allclose(rounded(found, grid, scheme), found, atol=1e-5)  # on its own grid

    def error(values):
        return float(((x @ (values - weight).T) ** 2).sum())

    nearest = rounded(weight, grid_of(weight, scheme, torch.float32), scheme)
    assert error(found) < 0.7 * error(nearest)
    assert error(found) == pytest.approx(error(torch.from_numpy(expected).float()), rel=0.02)


def test_four_bit_floats_in_blocks_of_32():
    """Against numpy, value by value; GPTQ rounds to the same values, with less error."""
    weight, x = draw(6, 64) * 3, draw(200, 64, seed=1) @ draw(64, 64, seed=2)
    scheme = scheme_of("MXFP4A16", 128, {64})
    assert (scheme.group_size, scheme.bits_per_weight) == (32, 4.25)
    grid = grid_of(weight, scheme, torch.bfloat16)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([-magnitudes[::-1], magnitudes])
    expected = np.empty((6, 64))
    for row in range(6):
        for start in (0, 32):
            part = weight[row, start : start + 32].double().numpy()
            scale = 2.0 ** (np.floor(np.log2(np.abs(part).max())) - 2)
            nearest = np.abs(part[:, None] / scale - values).argmin(1)
            expected[row, start : start + 32] = values[nearest] * scale
    assert rounded(weight, grid, scheme).numpy() == pytest.approx(expected, abs=1e-6)
    found, grid = gptq(weight, x.T @ x, scheme, torch.bfloat16)
    assert torch.equal(rounded(found, grid, scheme), found)
    errors = [
        ((x @ (w - weight).T) ** 2).sum() for w in (found, torch.from_numpy(expected).float())
    ]
    assert errors[0] < 0.8 * errors[1]


def test_gptq_where_nothing_came_by_is_nearest_rounding():
    scheme, weight = Scheme("", 4, 0, 16), draw(8, 32)
    found, grid = gptq(weight, torch.zeros(32, 32), scheme, torch.float32)
    assert torch.equal(found, rounded(weight, grid, scheme))
    gram = torch.diag(torch.arange(32.0))  # the first channel is always 0
    assert torch.isfinite(gptq(weight, gram, scheme, torch.float32)[0]).all()


def test_awq_protects_the_channels_that_meet_large_activations():
    scheme, weight = Scheme("", 3, 0, 16), draw(24, 32)
    x = draw(300, 32, seed=1)
    x[:, [3, 17]] *= 30
    size, gram = x.abs().mean(0), x.T @ x
    none = awq_scales([(weight, gram)], size, scheme, torch.float32, steps=1)
    assert torch.allclose(none, torch.ones(32))  # a = 0: nearest rounding
    scales = awq_scales([(weight, gram)], size, scheme, torch.float32)

    def error(scales):
        scaled = weight * scales
        values = rounded(scaled, grid_of(scaled, scheme, torch.float32), scheme) / scales
        return float(((x @ (values - weight).T) ** 2).sum())

    assert error(scales) < 0.8 * error(none)
    grid = [size ** (step / 20) for step in range(20)]
    grid = [s / (s.max() * s.min()) ** 0.5 for s in grid]
    assert error(scales) == pytest.approx(min(error(s) for s in grid), rel=1e-3)


def test_smoothquant_scales():
    weights, largest = [draw(8, 16), draw(4, 16, seed=1)], draw(16, seed=2).abs() * 50
    found = smooth_scales(weights, largest, 0.85).numpy()
    widest = np.abs(np.concatenate([weight.numpy() for weight in weights])).max(0)
    assert np.allclose(found, largest.numpy() ** 0.85 / widest**0.15, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def theirs(folder):
    return llama(folder, num_hidden_layers=3, hidden_size=64, intermediate_size=128)


def quantise(folder, out, scheme, method="rtn", *options):
    words = ["quantize", folder / "ours", "--scheme", scheme, "--method", method, "--out", out]
    words += ["--calibration", folder / "text", "--tokens", 512, "--window", 32]
    return compress([*words, "--group-size", 32, *options])


def logits_of_ours(path):
    return logits(load_ours(path), ROWS)


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("W8A16", "gptq"),
        ("W4A16", "awq"),
        ("MXFP4A16", "rtn"),
        ("W3A16", "gptq"),
        ("W4A16_ASYM", "rtn"),
    ],
)
def test_transformers_reads_what_was_exported(scheme, method, folder, theirs, tmp_path):
    assert quantise(folder, tmp_path / "small", scheme, method) == 0
    found = logits_of_ours(tmp_path / "small")
    export_model(tmp_path / "small", tmp_path / "out")
    # Zero points fit only where transformers dequantises at once: for a model that stays packed,
    # compressed-tensors 0.20 makes room for them unpacked.
    # 4-bit floats become bfloat16 while the model runs.
    plain = scheme in ("W4A16_ASYM", "MXFP4A16")
    packed = {"quantization_config": DEQUANTISED} if plain else {}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **packed)
    read = read.float() if plain else read
    with torch.no_grad():
        assert (read.eval()(ROWS).logits - found).abs().max() <= 1e-4
        assert (theirs(ROWS).logits - found).abs().max() > 1e-3  # it is another model
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "model.layers.0.self_attn.q_proj.weight_packed" in names["weight_map"]


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_experts_are_rounded_and_the_router_is_not(method, tmp_path):
    settings = SETTINGS | {"hidden_size": 64, "num_hidden_layers": 2, "num_experts": 4}
    settings |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    theirs = saved(Qwen3MoeConfig(**settings), tmp_path)
    assert quantise(tmp_path, tmp_path / "small", "W4A16", method) == 0
    found = logits_of_ours(tmp_path / "small")
    one, other = Safetensors(tmp_path / "ours"), Safetensors(tmp_path / "small")
    for name in ("mlp.router.weight", "mlp.experts.w1", "mlp.experts.w2"):
        before, after = (source.read(f"decoder.layers.1.{name}") for source in (one, other))
        # AWQ folds the scales of the norm into the router, which stays as exact as it was.
        exact = "router" in name and method != "awq"
        assert torch.equal(before, after) == exact
    export_model(tmp_path / "small", tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (read(ROWS).logits - found).abs().max() <= 1e-4
        assert (theirs(ROWS).logits - found).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_scales_leave_the_float_model_as_it_is(method, folder, theirs, monkeypatch):
    """With rounding taken out, logits stay."""
    from pangu.weights import quantize_layers

    before = logits_of_ours(folder / "ours")
    chunks, _ = build_model(read_file(folder / "ours" / "config.yaml", "model"))
    restore.load_model(folder / "ours", chunks)
    quantizer = quantize_layers.Quantizer(method, Scheme("", 4, 0, 32), torch.float32)
    monkeypatch.setattr(quantizer, "_round", lambda *_: None)
    old = {name: weight.clone() for name, weight in chunks[0].named_parameters()}
    quantizer.run(chunks[0], [ROWS[0], ROWS[1]])
    changed = [n for n, w in chunks[0].named_parameters() if not torch.equal(w, old[n])]
    assert any("linear_qkv" in name for name in changed)
    with torch.no_grad():
        after = chunks[0](ROWS, torch.arange(24).expand(2, 24), None)
    assert (after - before).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("scheme", "method", "dtype", "farthest"),
    [("W8A8", "smoothquant", "int8", 0.1), ("W4A8", "gptq", "int4", 0.6)],
)
def test_eight_bit_activations(scheme, method, dtype, farthest, folder, theirs, tmp_path):
    """The model itself rounds them; what is exported stands for the same weights."""
    assert quantise(folder, tmp_path / "small", scheme, method) == 0
    config = read_file(tmp_path / "small" / "config.yaml", "model")
    assert (config.model.activation_bits, config.inference.weight_dtype) == (8, dtype)
    planned = load([f"experiment={tmp_path / 'small' / 'model.yaml'}"])
    assert (planned.inference.weight_dtype, planned.inference.compute_dtype) == (dtype, "int8")
    found = logits_of_ours(tmp_path / "small")
    export_model(tmp_path / "small", tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(ROWS).logits
        # compressed-tensors' own stand-in divides by 127.5 where vLLM, and we, divide by 127.
        assert (read(ROWS).logits - found).abs().mean() <= 0.05 * expected.std()
    assert 1e-3 < (found - expected).abs().mean() < farthest * expected.std()


def test_what_cannot_be_made_of_a_quantised_model(folder, theirs, tmp_path, capsys):
    small, out = tmp_path / "small", tmp_path / "out"
    assert quantise(folder, small, "W4A4") == 0
    with pytest.raises(WeightsError, match="W4A4 has no layout that other programs read"):
        export_model(small, out)
    for name in ("W8A8_ASYM", "W4A16KV4"):
        with pytest.raises(WeightsError, match=f"{name} has no layout"):
            description(scheme_of(name, 32, {64}), load([]), ARCHITECTURES["LlamaForCausalLM"])
    common = ["--calibration", folder / "text", "--out", out]
    for words, message in (
        (["quantize", small, "--scheme", "W8A8"], "quantise the model that it was made of"),
        (["carve", small, "--experts", "S1A1E2"], "its codes do not fall into experts"),
    ):
        assert compress([*words, *common]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"is quantised already (W4A4): {message}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_an_unknown_scheme(folder, theirs, tmp_path, capsys):
    assert quantise(folder, tmp_path / "small", "W4") == 2
    assert "--scheme W4: as W4A16" in capsys.readouterr().err
    words = ["quantize", folder / "ours", "--scheme", "W4A16", "--calibration", folder / "text"]
    assert compress([*words, "--group-size", 1000, "--out", tmp_path / "small"]) == 2
    assert "8, 16, 32, 64 would do" in " ".join(capsys.readouterr().err.split())
    assert compress([*words, "--backend", "tpu", "--out", tmp_path / "small"]) == 2
    assert "is none of auto, cpu, cuda, npu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ways_that_no_other_test_goes_end_as_they_should(tmp_path):
    """All of them: `python -m tests.drills.quantize`."""
    expected = {
        Way("experts", "MXFP4A16", "smoothquant"): ("works", "works"),
        Way("experts", "W4A8KV3", "gptq", ("--keys", "channel", "--rotate")): ("works", "refused"),
        Way("dense", "W2A8_ASYM", "awq"): ("works", "refused"),
        Way("dense", "W16A8_ASYM", "rtn"): ("refused", None),
    }
    assert set(expected) <= set(ways())
    found = {way: (end.kind, after and after.kind) for way, end, after in tried(expected, tmp_path)}
    assert found == expected


def test_codes_are_read_again_from_bfloat16():
    scheme, weight = Scheme("", 8, 0, 0), draw(16, 64).bfloat16()
    grid = grid_of(weight, scheme, torch.bfloat16)
    values = rounded(weight, grid, scheme)
    assert torch.equal(codes_of(values.bfloat16(), grid, scheme), codes_of(values, grid, scheme))


def test_eight_bit_experts_go_out_as_vllm_reads_them(tmp_path):
    """transformers 5.23 does not convert them: every int8 weight times its scale is ours."""
    settings = SETTINGS | {"hidden_size": 64, "num_hidden_layers": 1, "num_experts": 4}
    settings |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    saved(Qwen3MoeConfig(**settings), tmp_path)
    assert quantise(tmp_path, tmp_path / "small", "W8A8", "smoothquant") == 0
    export_model(tmp_path / "small", tmp_path / "out")
    ours, theirs = Safetensors(tmp_path / "small"), Safetensors(tmp_path / "out")
    w1 = ours.read("decoder.layers.0.mlp.experts.w1")
    for expert in range(4):
        for part, name in enumerate(("gate_proj", "up_proj")):
            base = f"model.layers.0.mlp.experts.{expert}.{name}"
            codes, scale = theirs.read(f"{base}.weight"), theirs.read(f"{base}.weight_scale")
            assert (codes.dtype, tuple(scale.shape)) == (torch.int8, (32, 1))
            assert torch.allclose(codes * scale, w1[expert, :, part].T, atol=1e-6)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    gate = theirs.read("model.layers.0.mlp.gate.weight")
    assert gate.dtype is torch.float32
    assert any("gate" in name for name in ignored["ignore"])
