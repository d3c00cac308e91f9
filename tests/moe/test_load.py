from dataclasses import replace

import gloo
import layers
import pytest
import torch

from pangu.moe.load import (
    dead_experts,
    device_imbalance,
    dropped_tokens,
    expert_imbalance,
    imbalance_score,
    read_expert_bias,
)
from pangu.moe.routing import moge, top_k


def test_imbalance_score_is_the_papers():
    counts = torch.tensor([5, 1, 2, 0])  # 4 tokens, 2 choices each
    assert imbalance_score(counts, devices=2, top_k=2) == (6 - 2) / 4
    assert imbalance_score(counts, devices=4, top_k=2) == (5 - 0) / 4
    assert imbalance_score(torch.zeros(4, dtype=torch.int64), devices=2, top_k=2) == 0


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_moge_is_exactly_balanced_when_devices_hold_whole_groups(devices):
    scores = torch.randn(16, 64)
    counts = {1: moge(scores, num_groups=8, k=8).sum(0)}
    assert device_imbalance(counts, devices, top_k=8) == 0.0
    assert expert_imbalance(counts, top_k=8) > 0


def test_mean_imbalance_of_uniform_top_k_is_the_papers_figure():
    """N=64, K=8, M=8, |X|=16, uniform choice: mean IS 0.668."""
    generator = torch.Generator().manual_seed(0)
    layers = {n: top_k(torch.rand(16, 64, generator=generator), k=8).sum(0) for n in range(4000)}
    assert device_imbalance(layers, devices=8, top_k=8) == pytest.approx(0.668, abs=0.01)


def test_dead_experts_and_dropped_tokens():
    counts = {1: torch.tensor([2, 0, 4, 2]), 3: torch.tensor([2, 2, 2, 2])}
    assert dead_experts(counts) == {1: [1]}
    assert dropped_tokens(counts, tokens=4, top_k=2) == 0
    assert dropped_tokens(counts, tokens=5, top_k=2) == 4


def test_the_balancing_bias_is_read_by_layer():
    gloo.single()
    layer = layers.build(replace(layers.TOP_K, expert_bias=True, score_function="sigmoid"))
    bias = torch.arange(layers.EXPERTS) / 8
    layer.router.expert_bias.copy_(bias)
    assert read_expert_bias([layer]) == {1: bias.tolist()}
    assert read_expert_bias([layers.build(layers.TOP_K)]) == {}
