"""Keys and values of few bits against plain numpy, over a cache, and through the command."""

import json
import warnings
from dataclasses import replace

import gloo
import numpy as np
import pytest
import torch
from compression.tiny import SETTINGS, TEXT, compress, saved
from gloo import single
from inference.tiny_models import KINDS, build, decode, greedy, prompts
from transformers import Qwen2Config
from typer.testing import CliRunner

from configs.check import load_checked
from configs.compose import load, read_file
from configs.schema import ParallelConfig
from configs.violation import ConfigError
from pangu.checkpoint import restore
from pangu.checkpoint.tensor_files import WeightsError
from pangu.data.tokenizer import load_tokenizer
from pangu.inference.batching import Request
from pangu.inference.engine import Engine
from pangu.inference.sampling import Sampling
from pangu.model.build import build_model
from pangu.ops.rounded_cache import round_cached, round_channels, round_spans
from pangu.weights.convert import export_model, import_model
from pangu.weights.hadamard import hadamard
from simulator.__main__ import application


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_numpy(x, bits, clip):
    """Group by group, as the papers' formula has it."""
    out = np.empty_like(x)
    for place in np.ndindex(x.shape[:-1]):
        for start in range(0, x.shape[-1], 128):
            part = x[place][start : start + 128]
            low, step = part.min() * clip, (part.max() - part.min()) * clip / (2**bits - 1)
            codes = np.clip(np.rint((part - low) / step), 0, 2**bits - 1)
            out[place][start : start + 128] = codes * step + low
    return out


@pytest.mark.parametrize(("width", "bits"), [(64, 4), (256, 3), (128, 8)])
def test_tokens_are_rounded_as_the_formula_says(width, bits):
    key, value = draw(5, 2, 3, width), draw(5, 2, 3, width, seed=1)
    for x, clip in ((key, 0.95), (value, 1.0)):
        found = round_spans(x, bits, clip).numpy()
        assert found == pytest.approx(in_numpy(x.double().numpy(), bits, clip), abs=1e-4)
    same, values = round_cached(key, value, bits, "channel")
    assert torch.equal(same, key)
    assert torch.allclose(values, round_spans(value, bits), atol=1e-6)
    turned = hadamard(width)
    found, _ = round_cached(key, value, bits, "token")
    expected = in_numpy(key.double().numpy() @ turned, bits, 0.95) @ turned.T
    # A code that lies half-way may fall to either side.
    assert (np.abs(found.numpy() - expected) < 1e-4).mean() > 0.99


def test_no_bits_leave_keys_alone_and_gradients_pass():
    key, value = draw(3, 1, 2, 24).requires_grad_(), draw(3, 1, 2, 24, seed=1)
    assert round_cached(key, value, 0, "token") == (key, value)
    round_cached(key, value, 3, "token")[0].sum().backward()
    assert torch.allclose(key.grad, torch.ones_like(key))


def test_a_constant_added_to_keys_changes_no_error_by_channel():
    """What a key bias is: the reason for rounding before rotation."""
    key, bias = draw(40, 1, 2, 16), 50 * draw(2, 16, seed=1)

    def error(key, other):
        low, high = key.flatten(0, 1).amin(0), key.flatten(0, 1).amax(0)
        return (round_channels(other, low, (high - low) / 15, 4) - other).double()

    later = draw(20, 1, 2, 16, seed=2)
    assert torch.allclose(error(key, later), error(key + bias, later + bias), atol=1e-3)
    assert (error(key, key).abs() < 0.3).all()
    zeros = torch.zeros(2, 16)
    assert torch.equal(round_channels(key, zeros, zeros, 4), key)  # not calibrated


@pytest.mark.parametrize("kind", ["dense", "mla"])
@pytest.mark.parametrize("bits", [8, 3])
def test_what_a_cache_gives_back_is_what_the_plain_pass_computes_with(kind, bits):
    model = build(*KINDS[kind], f"model.kv_bits={bits}")
    engine = Engine(model, vocab_size=64, cache_tokens=512, page_size=4, max_batch_tokens=16)
    asked = [Request(prompt, 8, Sampling(temperature=0)) for prompt in prompts(4)]
    expected = [greedy(model, request.prompt, 8) for request in asked]
    assert decode(engine, asked) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen2 whose keys have a large constant part in a few channels, as the released ones do."""
    folder = tmp_path_factory.mktemp("cache")
    config = Qwen2Config(**{**SETTINGS, "hidden_size": 64, "num_hidden_layers": 2})
    theirs = saved(config, folder)
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.self_attn.k_proj.bias.zero_()[3::11] = 8.0
    theirs.save_pretrained(folder / "theirs")
    import_model(folder / "theirs", folder / "outliers")
    return folder


def quantise(folder, out, scheme, keys):
    words = ["quantize", folder / "outliers", "--scheme", scheme, "--keys", keys, "--out", out]
    words += ["--calibration", folder / "text", "--tokens", 512, "--window", 32]
    return compress(words)


def logits_of(config, path):
    """Of text that limits were found on: they clip what lies outside."""
    ids = load_tokenizer(path / "tokenizer").encode(TEXT)[: 16 * 32]
    rows = torch.tensor(ids).view(-1, 32)
    chunks, _ = build_model(config)
    restore.load_model(path, chunks)
    with torch.no_grad():
        return chunks[0].eval()(rows, torch.arange(32).expand_as(rows), None)


def logits(path):
    single()
    return logits_of(read_file(path / "config.yaml", "model"), path)


@pytest.fixture(scope="module")
def errors(folder):
    """Mean distance of the logits from the float model's, by scheme and keys, over their spread."""
    plain, found = logits(folder / "outliers"), {}
    for scheme in ("W16A16KV8", "W16A16KV4"):
        for keys in ("token", "channel"):
            out = folder / f"{scheme}-{keys}"
            assert quantise(folder, out, scheme, keys) == 0
            found[scheme[6:], keys] = float((logits(out) - plain).abs().mean() / plain.std())
    return found


def test_eight_bits_are_nearly_float_and_outliers_want_keys_before_rotation(errors):
    assert errors["KV8", "channel"] < 0.02
    assert errors["KV4", "channel"] < 0.85 * errors["KV4", "token"]
    assert errors["KV8", "token"] < errors["KV4", "token"]


def test_the_simulator_prices_the_cache_and_export_refuses_it(folder, errors, tmp_path):
    planned = load([f"experiment={folder / 'W16A16KV4-channel' / 'model.yaml'}"])
    assert (planned.inference.kv_dtype, planned.inference.weight_dtype) == ("int4", "bf16")
    memory = {}
    for name in ("outliers", "W16A16KV8-token", "W16A16KV4-token"):
        words = [f"experiment={folder / name / 'model.yaml'}", "hardware=h100", "devices=1"]
        words += ["inference.batch_size=4096", "inference.prompt_length=32768", "--json"]
        done = CliRunner().invoke(application(["infer"]), ["infer", *words])
        memory[name] = json.loads(done.output)["memory_gib"]
    plain, half, quarter = memory.values()
    cache = 4096 * (32768 + 128) * 2 * 2 * 2 * 16 * 2 / 2**30  # layers, K and V, heads, d, bytes
    assert plain - half == pytest.approx(cache / 2, rel=0.02)
    assert half - quarter == pytest.approx(cache / 4, rel=0.02)
    with pytest.raises(WeightsError, match="W16A16KV4 has no layout"):
        export_model(folder / "W16A16KV4-token", tmp_path / "out")


def on_two_ranks(path):
    from pangu.engines.megatron import process_groups

    warnings.filterwarnings("ignore")
    config = read_file(path / "config.yaml", "model")
    config = replace(config, parallel=ParallelConfig(tensor_model_parallel_size=2))
    process_groups.initialize(config)
    found = logits_of(config, path).numpy()
    gloo.drop_groups()
    return found


@pytest.mark.distributed
def test_limits_of_keys_are_those_of_the_ranks_own_heads(folder, errors):
    expected = logits(folder / "W16A16KV4-channel").numpy()
    parts = gloo.run(2, on_two_ranks, folder / "W16A16KV4-channel")
    found = np.concatenate(parts, -1)
    assert np.abs(found - expected).mean() < 0.02 * expected.std()


def test_latent_attention_has_no_keys_before_rotation():
    latent = [*KINDS["mla"], "model.kv_bits=4", "model.key_rounding=channel"]
    with pytest.raises(ConfigError, match="latent attention has no keys before their rotation"):
        load_checked(latent)
