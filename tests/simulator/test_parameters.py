"""Parameter and FLOPs counts against published totals and against counts done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from configs.compose import load
from simulator.parameters import (
    count_parameters,
    layer_parameters,
    model_flops_per_token,
)


@pytest.mark.parametrize(
    ("model", "total", "active", "digits"),
    [
        ("pangu_pro_moe", 71.99, 16.50, 2),
        ("mixtral_8x7b", 46.7, 12.9, 1),
        ("qwen3_30b_a3b", 30.5, 3.4, 1),
        ("qwen2_57b_a14b", 57.4, 14.2, 1),
        ("qwen2_0_5b", 0.49, 0.49, 2),
        ("deepseek_v3", 671, 38, 0),
    ],
)
def test_published_totals_with_both_vocabulary_tables(model, total, active, digits):
    count = count_parameters(load([f"model={model}"]))
    assert round(count.total / 1e9, digits) == total
    assert round(count.active / 1e9, digits) == active


def test_pangu_ultra_moe_with_one_vocabulary_table():
    count = count_parameters(load(["model=pangu_ultra_moe"]))
    table = count.parts["embedding"]
    assert round((count.total - table) / 1e9, 1) == 717.9
    assert round((count.active - table) / 1e9, 1) == 39.2
    assert count.mtp == pytest.approx(12.44e9, rel=1e-3)
    assert count.allocated == count.total + count.mtp


def test_active_counts_published_with_one_vocabulary_table():
    """DeepSeek-V3's 37 B and Qwen3's 3.3 B lie between one and two tables."""
    for model, published in (("deepseek_v3", 37e9), ("qwen3_30b_a3b", 3.3e9)):
        count = count_parameters(load([f"model={model}"]))
        assert count.active - count.parts["embedding"] <= published <= count.active


def test_dense_sibling_is_near_its_name():
    count = count_parameters(load(["model=pangu_ultra_dense"]))
    assert count.total == count.active
    assert count.total == pytest.approx(135e9, rel=0.01)


def test_tiny_model_by_hand():
    config = load(["model=moge_tiny"])
    attention = 128 * (4 + 2 * 2) * 32 + 128 * 128
    experts = 16 * 3 * 128 * 64
    shared = 3 * 128 * 128
    layer = attention + experts + shared + 16 * 128 + 2 * 128
    assert count_parameters(config).total == 1024 * 128 + 4 * layer + 128


def test_layouts_cut_matrices_and_keep_norms():
    config = load(["model=moge_tiny"])
    whole = layer_parameters(config.model, config.moe, "moe")
    tp = np.array([1, 2, 4])
    cut = layer_parameters(config.model, config.moe, "moe", tp=tp, ep=2, etp=1)
    np.testing.assert_allclose(cut.experts, whole.experts / 2)
    assert cut.norms == whole.norms
    # two KV heads over four ranks: a rank still holds one key head and one value head
    qkv = 128 * 32 * np.array([4 + 4, 2 + 2, 1 + 2])
    np.testing.assert_allclose(cut.attention, qkv + 128 * 128 / tp)


def test_model_flops_by_hand():
    config = load(["model=moge_tiny", "train.seq_length=512"])
    matrices = 128 * 8 * 32 + 128 * 128 + 16 * 128 + 3 * 128 * 128 + 4 * 3 * 128 * 64
    scores = 3 * 512 * 4 * (32 + 32)
    expected = 4 * (6 * matrices + scores) + 6 * 1024 * 128
    assert model_flops_per_token(config) == expected
    assert model_flops_per_token(config, causal=False) == expected + 4 * scores


def test_mtp_adds_a_layer_a_projection_and_the_head():
    config = load(["model=pangu_ultra_moe", "train.seq_length=8192"])
    extra = model_flops_per_token(config) - model_flops_per_token(config, mtp=False)
    config.model.num_layers += 1
    layer = model_flops_per_token(config, mtp=False)
    config.model.num_layers -= 1
    layer -= model_flops_per_token(config, mtp=False)
    assert extra == pytest.approx(layer + 6 * (2 * 7680**2 + 153600 * 7680))
