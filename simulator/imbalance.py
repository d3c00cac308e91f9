"""Token imbalance between expert-parallel ranks, as a distribution.

`tokens` tokens each choose `top_k` of `experts` experts, which lie in equal contiguous blocks on
`ranks` ranks. The load of a rank is the number of token-expert pairs it receives. The slowest rank
sets the pace of a step, so that what matters is E[max load] / mean load, the straggler factor.

Loads are close to normal, with the variance of sampling without replacement; a skewness term
mends small batches. MoGE (`groups` > 1) chooses top_k / groups experts inside every group, so that
ranks holding whole groups receive exactly equal loads (arXiv 2505.21411, section 2).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from configs.schema import MoEConfig
from simulator.array import Array


def straggler_factor(
    tokens: Array,
    experts: int,
    top_k: int,
    ranks: Array,
    *,
    groups: int = 1,
    popularity: np.ndarray | None = None,
) -> Array:
    """E[max over ranks of load] / mean load.

    `groups` > 1 is MoGE's routing. `popularity` is how often each expert is chosen (any scale;
    null: alike), applied by successive sampling without replacement.
    """
    tokens, ranks = np.broadcast_arrays(
        np.asarray(tokens, dtype=float), np.asarray(ranks, dtype=float)
    )
    if popularity is not None:
        return _each_pair(
            tokens, ranks, lambda t, r: _skewed_factor(t, experts, top_k, r, popularity)
        )
    maximum = _each_rank(ranks, _expected_maximum)
    square = _each_rank(ranks, _expected_square_of_maximum)
    inside, chosen, spread = _block(experts, top_k, ranks, groups)
    share = np.minimum(1.0 / spread, 1.0)
    variance = chosen * share * (inside - chosen) / np.maximum(inside - 1, 1)
    skewness = _skewness(inside, chosen, inside * share) / np.sqrt(tokens)
    # All loads of a block sum to a constant: their differences are those of independent loads
    # with the variance above. MoGE's blocks are independent of each other, and there the plain
    # variance, (1 - share) of it, sets the maximum over many of them.
    variance = variance * (1.0 - share if groups > 1 else 1.0)
    excess = np.sqrt(variance / tokens) * (maximum + skewness / 6 * (square - 1.0))
    mean = top_k / ranks
    factor = np.where(spread > 1, 1.0 + excess / mean, 1.0)
    return np.minimum(factor, np.minimum(ranks, experts / top_k * 1.0) if groups == 1 else ranks)


def imbalance_score(
    tokens: Array, experts: int, top_k: int, ranks: Array, groups: int = 1
) -> Array:
    """Mean of IS(X) = (max load - min load) / |X| under uniform choice (the paper's section 2)."""
    tokens, ranks = np.broadcast_arrays(
        np.asarray(tokens, dtype=float), np.asarray(ranks, dtype=float)
    )
    maximum = _each_rank(ranks, _expected_maximum)
    inside, chosen, spread = _block(experts, top_k, ranks, groups)
    variance = chosen / np.maximum(spread, 1) * (inside - chosen) / np.maximum(inside - 1, 1)
    return np.where(spread > 1, 2.0 * maximum * np.sqrt(variance / tokens), 0.0)


def default_exponent(moe: MoEConfig, experts: int) -> float:
    """Zipf exponent of how often a real router chooses its experts: the finer the experts, the
    more skewed.

    0.57 at 16 experts per choice, by its third power: what the ModelZoo's dropless runs of Qwen3
    (128 experts, 8 chosen) lose against forced balance, and Mixtral (8, 2) loses next to nothing.
    Balancing by bias, and a loss over the expert-parallel group (arXiv 2505.04519), leave none
    worth counting. arXiv 2408.15664 has an auxiliary loss leave the fullest of 64 experts, 6
    chosen, 0.5 to 0.7 above the mean and the bias 0.04 (MaxVio; its table quoted from memory, only
    its abstract was at hand again): nothing rests on these two figures alone.
    """
    if moe.expert_bias or moe.aux_loss_scope == "ep_group":
        return 0.0
    return 0.57 * min(experts / moe.top_k / 16.0, 1.0) ** 3


def routing_factor(
    moe: MoEConfig, experts: int, tokens: Array, ranks: Array, zipf_exponent: float | None = None
) -> Array:
    """The straggler factor of a configured router: 1 where balance is forced or follows from
    MoGE or expert choice, the expectation under top-k otherwise, with experts of the popularity
    that `zipf_exponent` says (null: `default_exponent`; 0: alike). `moe.capacity_factor` is never
    exceeded."""
    tokens, ranks = np.asarray(tokens, dtype=float), np.asarray(ranks, dtype=float)
    if moe.router in ("forced_balance", "expert_choice") or not experts:
        return np.ones(np.broadcast_shapes(tokens.shape, ranks.shape))
    groups = moe.equal_groups
    if zipf_exponent is None:
        zipf_exponent = default_exponent(moe, experts)
    popularity = zipf(experts, zipf_exponent) if zipf_exponent and groups == 1 else None
    factor = straggler_factor(
        tokens, experts, moe.top_k, ranks, groups=groups, popularity=popularity
    )
    return np.minimum(factor, moe.capacity_factor) if moe.capacity_factor else factor


def zipf(experts: int, exponent: float) -> np.ndarray:
    """Popularity 1/rank^exponent, dealt over the blocks of experts as a fixed shuffle would
    (popular experts do not all sit on the first rank)."""
    order = np.random.default_rng(0).permutation(experts)
    return (1.0 + order) ** -exponent


def sample_loads(
    rng: np.random.Generator,
    samples: int,
    tokens: int,
    experts: int,
    top_k: int,
    ranks: int,
    *,
    groups: int = 1,
    popularity: np.ndarray | None = None,
) -> np.ndarray:
    """Loads `[samples, ranks]` drawn by Monte Carlo: what the formulas above approximate."""
    weights = np.zeros(experts) if popularity is None else np.log(popularity)
    size, chosen = experts // groups, top_k // groups
    loads = np.zeros((samples, ranks))
    for sample in range(samples):
        scores = weights + rng.gumbel(size=(tokens, experts))
        scores = scores.reshape(tokens * groups, size)
        picked = np.argpartition(-scores, chosen - 1, axis=1)[:, :chosen]
        offset = (np.arange(tokens * groups) % groups * size)[:, None]
        rank = (picked + offset) * ranks // experts
        loads[sample] = np.bincount(rank.ravel(), minlength=ranks)
    return loads


def inclusion_probabilities(popularity: np.ndarray, top_k: int) -> np.ndarray:
    """Probability that a token chooses each expert, under successive sampling without
    replacement: 1 - exp(-λ·p), with λ such that they sum to top_k (Rosén 1997); p itself for
    top-1."""
    share = np.asarray(popularity, dtype=float) / np.sum(popularity)
    if top_k == 1:
        return share
    low, high = 0.0, 1.0
    while (1.0 - np.exp(-high * share)).sum() < top_k:
        high *= 2.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1.0 - np.exp(-middle * share)).sum() < top_k:
            low = middle
        else:
            high = middle
    return 1.0 - np.exp(-high * share)


def _block(experts: int, top_k: int, ranks: Array, groups: int) -> tuple[Array, Array, Array]:
    """Experts among which one choice is made, how many it takes, and over how many ranks those
    experts spread (1: their rank's load is certain)."""
    return experts / groups, top_k / groups, np.maximum(ranks / groups, 1.0)


def _skewness(population: Array, draws: Array, marked: Array) -> Array:
    """Skewness of the hypergeometric distribution."""
    n, k, m = population, draws, marked
    below = np.sqrt(np.maximum(k * m * (n - m) * (n - k), 1e-12)) * np.maximum(n - 2, 1)
    return np.where((n > m) & (n > k), (n - 2 * m) * np.sqrt(n - 1) * (n - 2 * k) / below, 0.0)


def _skewed_factor(
    tokens: float, experts: int, top_k: int, ranks: int, popularity: np.ndarray
) -> float:
    chosen = inclusion_probabilities(popularity, top_k)
    starts = np.arange(ranks) * len(chosen) // ranks
    mean = tokens * np.add.reduceat(chosen, starts)
    deviation = np.sqrt(tokens * np.add.reduceat(chosen * (1.0 - chosen), starts))
    grid = np.linspace(mean.min() - 6 * deviation.max(), mean.max() + 6 * deviation.max(), 600)
    below = _normal_cdf((grid[:, None] - mean) / deviation).prod(axis=1)
    expected = grid[-1] - np.trapezoid(below, grid)
    return float(expected / (tokens * top_k / ranks))


def _each_rank(ranks: Array, function: Any) -> Array:
    """`function(ranks)` once for every distinct number of ranks."""
    distinct, where = np.unique(ranks, return_inverse=True)
    values = np.array([function(int(r)) for r in distinct])
    return values[np.ravel(where)].reshape(np.shape(ranks))


def _each_pair(tokens: Array, ranks: Array, function: Any) -> Array:
    """`function(tokens, ranks)` once for every distinct pair."""
    pairs = np.stack([np.ravel(tokens), np.ravel(ranks)])
    distinct, where = np.unique(pairs, axis=1, return_inverse=True)
    values = np.array([function(t, int(r)) for t, r in distinct.T])
    return values[np.ravel(where)].reshape(np.shape(ranks))


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))


def _erf(x: np.ndarray) -> np.ndarray:
    """To 1.5e-7 (Abramowitz and Stegun 7.1.26)."""
    t = 1.0 / (1.0 + 0.3275911 * np.abs(x))
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    return np.sign(x) * (1.0 - series * np.exp(-x * x))


@lru_cache(maxsize=1024)
def _expected_maximum(ranks: int) -> float:
    """E[max] of `ranks` standard normals."""
    grid, density = _maximum_density(ranks)
    return float(np.trapezoid(grid * density, grid))


@lru_cache(maxsize=1024)
def _expected_square_of_maximum(ranks: int) -> float:
    grid, density = _maximum_density(ranks)
    return float(np.trapezoid(grid**2 * density, grid))


def _maximum_density(ranks: int) -> tuple[np.ndarray, np.ndarray]:
    grid = np.linspace(-8.0, 8.0, 2001)
    normal = np.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
    return grid, ranks * _normal_cdf(grid) ** (ranks - 1) * normal
