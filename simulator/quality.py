"""What a shape is expected to learn: a published scaling law of Mixture-of-Experts models.

Ludziejewski et al. 2025, "Joint MoE Scaling Laws" (arXiv 2502.05172), equations 4 and 6 with the
coefficients of its table 3: the loss after `tokens` of a model of `active` parameters whose MLPs
hold `expansion` times the parameters that a token uses. Its experts are as wide as an MLP; what
finer ones gain is taken from Krajewski et al. 2024 (arXiv 2402.07871), table 1: the parameters'
term shrinks as (g/G^γ + a) does, G experts being used at once. Neither paper has tried the two
together, nor models as large as those that are planned here: good to compare shapes that are near
each other, not to forecast a loss.
"""

from __future__ import annotations

import numpy as np

from configs.schema import Config
from simulator.array import Array
from simulator.parameters import count_parameters

SOURCE = "arXiv 2502.05172 (table 3), granularity by arXiv 2402.07871 (table 1)"
FITTED = "fitted up to 2.7 B active and 5 B total parameters, 80 B tokens, 32 x expansion"
# Table 3.
A, ALPHA, DELTA, GAMMA = 35.91, -0.1889, -0.2285, 0.0098
B, BETA, OMEGA, ZETA = 35.98, -0.1775, 0.5529, -0.0259
E_START, E_MAX, LEAST = 2.0732, 290.4521, 1.3637
# Table 1 of 2402.07871.
FINE_A, FINE_G, FINE_GAMMA = 18.1, 2.1, 0.58


def expected_loss(active: Array, expansion: Array, granularity: Array, tokens: Array) -> Array:
    """Loss in nats per token of the papers' corpus (C4).

    Args:
        active: parameters that a token meets, both vocabulary tables among them.
        expansion: parameters of a MoE layer's MLPs over those that a token uses; 1 is dense.
        granularity: experts that a token uses, shared ones counted by their width.
        tokens: trained on.
    """
    start = 1.0 / (1.0 / E_START - 1.0 / E_MAX)
    experts = 1.0 / (1.0 / (np.asarray(expansion) - 1.0 + start) + 1.0 / E_MAX)
    log = np.log(experts)
    fine = (FINE_G / np.asarray(granularity) ** FINE_GAMMA + FINE_A) / (FINE_G + FINE_A)
    size = A * experts**DELTA * np.asarray(active, dtype=float) ** (ALPHA + GAMMA * log) * fine
    return (
        size + B * experts**OMEGA * np.asarray(tokens, dtype=float) ** (BETA + ZETA * log) + LEAST
    )


def used(config: Config, num_experts: Array, width: Array, shared: Array) -> tuple[Array, Array]:
    """Expansion and granularity of MoE layers of `num_experts` experts `width` wide, of which a
    token uses the configuration's `top_k` and an MLP `shared` wide."""
    meets = config.moe.top_k * width + shared
    return (num_experts * width + shared) / meets, meets / width


def model_loss(config: Config, tokens: float) -> float:
    """`expected_loss` of a model with experts."""
    model = config.model
    expansion, granularity = used(
        config, model.num_experts, model.moe_ffn_hidden_size, model.shared_expert_ffn_hidden_size
    )
    return float(expected_loss(count_parameters(config).active, expansion, granularity, tokens))
