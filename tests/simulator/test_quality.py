"""The expected loss against the papers' own tables."""

from __future__ import annotations

import numpy as np
import pytest

from configs.compose import load
from simulator.parameters import count_parameters
from simulator.quality import expected_loss, model_loss
from simulator.shape import front
from simulator.shape_space import Ranges, enumerate_shapes

# Table 4 of arXiv 2502.05172: the law reduced to m·N^µ + n·D^ν + c for a number of experts.
REDUCED = {
    1: (30.3640, -0.1817, 53.9838, -0.1965),
    2: (27.7982, -0.1780, 66.8401, -0.2065),
    4: (24.8462, -0.1731, 87.7022, -0.2192),
    8: (21.8330, -0.1676, 119.9126, -0.2338),
    16: (19.0159, -0.1617, 167.5073, -0.2494),
    32: (16.5424, -0.1557, 234.6726, -0.2652),
}


@pytest.mark.parametrize("experts", REDUCED)
def test_the_law_is_the_papers(experts):
    m, mu, n, nu = REDUCED[experts]
    for active, tokens in ((79e6, 5e8), (1.1e9, 80e9), (2.7e9, 9.2e9)):
        reduced = m * active**mu + n * tokens**nu + 1.3637
        assert expected_loss(active, experts, 1.0, tokens) == pytest.approx(reduced, rel=2e-3)


def test_finer_experts_shrink_the_parameters_term_alone():
    """(2.1/G^0.58 + 18.1)/(2.1 + 18.1) of arXiv 2402.07871; nothing else depends on G."""
    one = float(expected_loss(1e9, 8.0, 1.0, 1e30)) - 1.3637  # tokens' term is gone
    eight = float(expected_loss(1e9, 8.0, 8.0, 1e30)) - 1.3637
    assert eight / one == pytest.approx((2.1 / 8**0.58 + 18.1) / 20.2, rel=1e-3)


def test_a_model_is_read_as_the_law_reads_it():
    """Pangu Pro: 64 experts, 8 used, and a shared one as wide as four of them."""
    config = load(["model=pangu_pro_moe"])
    expected = expected_loss(count_parameters(config).active, (64 + 4) / 12, 12.0, 1e12)
    assert model_loss(config, 1e12) == pytest.approx(float(expected))


def test_shapes_that_learn_less_fall_out():
    config = load(["model=pangu_pro_moe"])
    ranges = Ranges([40, 48, 56], [4096, 5120], [40], [8], [32, 64], [8], [1344, 1728])
    every = enumerate_shapes(config, ranges)
    kept, _, active, rejected, _ = enumerate_shapes(config, ranges, tokens=1e12)
    assert rejected["a higher loss expected than the model's own"] == len(every[1]) - len(active)
    assert 0 < len(active) < len(every[1])
    own = [48, 5120, 40, 8, 64, 8, 1344]
    shapes = np.stack(list(kept.values()), axis=1).tolist()
    assert own in shapes  # no worse than itself
    assert [40, 4096, 40, 8, 32, 8, 1344] not in shapes
    assert front([]) == []
