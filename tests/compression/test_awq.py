"""AWQ inside experts: the float model stays, and no product on its own inputs is further from the
float one's than nearest rounding leaves it; clipping against a search in numpy."""

import numpy as np
import pytest
import torch
from compression.ours import logits
from compression.tiny import SETTINGS, saved
from gloo import single
from torch.nn.functional import silu
from transformers import DeepseekV3Config

from pangu.checkpoint import restore
from pangu.model.build import build_model
from pangu.moe.experts import GroupedExperts
from pangu.trained_model import read_run_config
from pangu.weights.quantize import Scheme, grid_of, rounded, scheme_of
from pangu.weights.quantize_layers import Quantizer

SCHEME = Scheme("", 3, 0, 8)
IDS = torch.arange(8 * 32).view(8, 32) * 7 % 272
SMALL = {**SETTINGS, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
# A dense layer, then one of four experts and a shared one.
DEEPSEEK = DeepseekV3Config(
    **{**SMALL, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2,
    n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, moe_intermediate_size=24,
    n_shared_experts=1, num_nextn_predict_layers=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("awq")
    saved(DEEPSEEK, path)
    return path


@pytest.fixture
def model(folder):
    """The model in float64."""
    single()
    config = read_run_config(folder / "ours")
    config.backend.precision = "fp64"
    chunks, _ = build_model(config)
    restore.load_model(folder / "ours", chunks)
    return chunks[0].eval()


def scaled(model, windows, monkeypatch):
    """Its weights after AWQ's scaling, here without rounding; before, by name."""
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    monkeypatch.setattr(Quantizer, "_round", lambda *_: None)
    Quantizer("awq", SCHEME, torch.float32).run(model, list(windows))
    return before, dict(model.named_parameters())


def experts_rows(model):
    """What each routed expert of the last layer is given for `IDS`: rows, weights."""
    found = []

    def look(_, args):
        rows, counts, weights = args
        found.append((rows.split(counts.tolist()), weights.split(counts.tolist())))

    (experts,) = [each for each in model.modules() if isinstance(each, GroupedExperts)]
    handle = experts.register_forward_pre_hook(look)
    logits(model, IDS)
    handle.remove()
    return list(zip(*found[0], strict=True))


def test_scales_inside_experts_leave_the_float_model(model, monkeypatch):
    """And the router's choices, bit by bit."""
    logs, rows = logits(model, IDS), experts_rows(model)
    before, after = scaled(model, IDS, monkeypatch)
    assert (logits(model, IDS) - logs).abs().max() <= 1e-9
    for (one, _), (other, _) in zip(rows, experts_rows(model), strict=True):
        assert one.shape == other.shape
    for name in (
        "0.mlp.linear_fc2.weight",
        "1.mlp.shared_experts.linear_fc2.weight",
        "1.mlp.experts.w2",
    ):
        assert not torch.equal(before[f"decoder.layers.{name}"], after[f"decoder.layers.{name}"])
    gate = "decoder.layers.1.mlp.experts.w1"
    each = [after[gate][expert, :, 0] / before[gate][expert, :, 0] for expert in range(4)]
    for other in each[1:]:  # one vector for what all of them read
        assert torch.allclose(each[0], other)


def test_no_expert_is_further_from_the_float_one_than_nearest_rounding_leaves_it(
    model, monkeypatch
):
    """Of the second products alone, in plain torch, each on the rows of its expert."""
    rows = experts_rows(model)
    before, after = scaled(model, IDS, monkeypatch)
    w1, w2 = (before[f"decoder.layers.1.mlp.experts.{name}"] for name in ("w1", "w2"))
    gained = 0
    for expert, (x, weights) in enumerate(rows):
        gate, up = (x @ w1[expert, :, half] for half in (0, 1))
        active = silu(gate) * up * weights[:, None]
        assert len(active) >= 24
        down, scaled_down = (w[expert].T for w in (w2, after["decoder.layers.1.mlp.experts.w2"]))
        scales = (scaled_down / down).mean(0)
        errors = [
            (active @ (nearest(down * s) / s - down).T).square().sum()
            for s in (torch.ones_like(scales), scales)
        ]
        assert errors[1] <= errors[0] * (1 + 1e-5)
        gained += bool(errors[1] < 0.99 * errors[0])
    assert gained


def nearest(weight):
    return rounded(weight, grid_of(weight, SCHEME, torch.float32), SCHEME)


def test_an_expert_that_few_tokens_reached_is_rounded_to_the_nearest(model, monkeypatch):
    """Its second matrix; four tokens say nothing of 24 channels."""
    before, after = scaled(model, IDS[:1, :4], monkeypatch)
    assert torch.equal(*(each["decoder.layers.1.mlp.experts.w2"] for each in (before, after)))
    Quantizer("awq", SCHEME, torch.float32).run(model, [IDS[0, :4]])
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


@pytest.mark.parametrize("name", ["W3A16", "W4A16_ASYM"])
def test_clipping_is_that_of_least_output_error(name):
    """Of each group alone as a search in numpy finds it; of the row as a whole never worse."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator) ** 3
    x = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    scheme = scheme_of(name, 16, {32})
    found = grid_of(weight, scheme, torch.float32, clip=True, gram_CC=x.T @ x)
    plain = grid_of(weight, scheme, torch.float32)
    low, high = scheme.limits
    changed = 0
    for row in range(6):
        best = np.empty(32)
        for start in (0, 16):
            part, seen = weight[row, start : start + 16].numpy(), x[:, start : start + 16].numpy()
            tried = []
            for inside in 1 - np.arange(21) / 40:
                least, most = min(part.min(), 0) * inside, max(part.max(), 0) * inside
                if scheme.symmetric:
                    scale, zero = 2 * max(-least, most) / (high - low), 0
                else:
                    scale = (most - least) / (high - low)
                    zero = np.clip(np.round(low - least / scale), low, high)
                codes = np.clip(np.round(part / scale + zero), low, high)
                tried.append((codes - zero) * scale)
            errors = [((seen @ (values - part)) ** 2).sum() for values in tried]
            best[start : start + 16] = tried[int(np.argmin(errors))]
        whole = rounded(weight, plain, scheme)[row].numpy()
        errors = [((x.numpy() @ (v - weight[row].numpy())) ** 2).sum() for v in (best, whole)]
        expected = best if errors[0] < errors[1] else whole
        assert np.allclose(rounded(weight, found, scheme)[row].numpy(), expected, atol=1e-5)
        changed += errors[0] < errors[1]
    assert changed
