"""The closed forms of MoESD (arXiv 2505.19645): what drafts gain, and which experts tokens wake.

Letters as in the paper: α accepts a drafted token, γ is the draft's length, E experts of which
every token chooses K (ρ = K/E), t tokens in one pass.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from configs.violation import ConfigError, Violation
from simulator.array import Array
from simulator.imbalance import inclusion_probabilities

SATURATED = 0.95  # τ: this part of all experts counts as all of them
_CERTAIN = 1.0 - 1e-12


def sigma(acceptance: Array, draft_tokens: Array) -> Array:
    """σ, the tokens of a round over the γ + 1 that it can give at most:
    [(1 - α^(γ+1)) / (1 - α)] / (γ + 1) (equation 5)."""
    alpha, most = np.broadcast_arrays(
        np.asarray(acceptance, dtype=float), np.asarray(draft_tokens, dtype=float) + 1
    )
    every = alpha >= 1.0
    below = np.where(every, 0.0, alpha)
    return np.where(every, 1.0, (1.0 - below**most) / (1.0 - below) / most)


def acceptance(share: float, draft_tokens: int) -> float:
    """α of a measured σ, by bisection: `sigma` grows with it from 1/(γ + 1) to 1."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sigma(middle, draft_tokens) < share else (low, middle)
    return (low + high) / 2


def active_experts(
    tokens: Array,
    experts: int,
    top_k: Array,
    *,
    chosen: np.ndarray | None = None,
    ranks: int = 1,
) -> Array:
    """N(t), the experts that at least one of `tokens` chooses, E·(1 - ((E - K)/E)^t) (equation 8),
    of the rank that holds most of them where they lie on `ranks`.

    `chosen` are the probabilities `[layers, experts]` that a token chooses each expert: then
    Σ_e 1 - (1 - p_e)^t, the mean over layers. MoGE takes K/G of the E/G experts of every group, and
    so each with K/E: its expectation is the same, and only its popularity is a matter of groups.
    Tokens are taken to choose independently. Neighbours in a text choose alike: an upper bound.
    """
    t = np.asarray(tokens, dtype=float)
    if chosen is None:
        share = np.minimum(np.asarray(top_k, dtype=float) / experts, _CERTAIN)
        return experts / ranks * (1.0 - (1.0 - share) ** t)
    idle = np.log1p(-np.minimum(chosen, _CERTAIN))
    awake = 1.0 - np.exp(t[..., None, None] * idle)  # [..., layers, experts]
    on_rank = awake.reshape(*awake.shape[:-1], ranks, experts // ranks).sum(axis=-1)
    return on_rank.max(axis=-1).mean(axis=-1)


def tokens_per_expert(tokens: Array, experts: int, top_k: int) -> Array:
    """Tokens of an expert that has any: ρt / (1 - (1 - ρ)^t) (equation 10). The sparser, the fewer,
    and so the longer is a pass bound by memory."""
    return np.asarray(tokens, dtype=float) * top_k / active_experts(tokens, experts, top_k)


def saturation_tokens(experts: int, top_k: int) -> int:
    """T_thres = ⌈log_{1-ρ}(1 - τ)⌉ (equation 9): from here on more tokens wake no more experts."""
    if top_k >= experts:
        return 1
    return int(np.ceil(np.log(1.0 - SATURATED) / np.log1p(-top_k / experts) - 1e-9))


def read_popularity(path: Path, experts: int, top_k: int) -> np.ndarray:
    """Probabilities `[layers, experts]` that a token of a real run chose each expert, from the
    `expert_load.json` of its folder.

    Raises:
        ConfigError: the file cannot be read, is none, or is of another number of experts.
    """

    def wrong(reason: str) -> ConfigError:
        return ConfigError([Violation("--popularity", path, reason)])

    try:
        counts = np.array(list(json.loads(path.read_text())["counts"].values()), dtype=float)
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise wrong("is not the expert_load.json of a run") from None
    if counts.ndim != 2 or not np.all(np.isfinite(counts)) or counts.min(initial=0.0) < 0:
        raise wrong("is not the expert_load.json of a run")
    if counts.shape[1] != experts:
        raise wrong(f"has {counts.shape[1]} experts, the model {experts}")
    chosen = counts.sum(axis=1, keepdims=True)
    if not chosen.min(initial=np.inf) > 0:
        raise wrong("has a layer that no token went through")
    return np.minimum(counts / chosen * top_k, _CERTAIN)


def read_touched(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a pass, rising, and experts of a layer that it touched, from what `pangu.generate`
    wrote to `speculative.measured`; passes of as many tokens count alike.

    Raises:
        ConfigError: the file cannot be read, or tells of no experts.
    """

    def wrong(reason: str) -> ConfigError:
        return ConfigError([Violation("--touched", path, reason)])

    try:
        rounds = json.loads(path.read_text())["rounds"]
        found: dict[int, list[float]] = {}
        for row in rounds:
            if row.get("experts") is not None:
                tokens = int(row["sequences"]) * (int(row["guesses"]) + 1)
                found.setdefault(tokens, []).append(float(row["experts"]))
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise wrong("is not what speculative.measured=FILE writes") from None
    if not found or min(found) < 1:
        raise wrong("tells of no experts that a pass touched")
    rising = sorted(found)
    return np.array(rising, dtype=float), np.array([np.mean(found[each]) for each in rising])


def popularity_at(chosen: np.ndarray, top_k: int, groups: int = 1) -> np.ndarray:
    """What `chosen` would be if every token chose `top_k` experts, `top_k` / `groups` of each
    group: the same experts are preferred, in successive sampling without replacement."""
    layers, experts = chosen.shape
    if top_k >= experts:
        return np.full_like(chosen, _CERTAIN)
    if top_k == (own := round(float(chosen.sum(axis=1).mean()))):
        return chosen
    preferred = chosen if own == groups else -np.log1p(-np.minimum(chosen, _CERTAIN))
    preferred = np.maximum(preferred, 1e-12)  # of an expert that had no token
    found = [
        inclusion_probabilities(row, top_k // groups)
        for row in preferred.reshape(layers * groups, -1)
    ]
    return np.minimum(np.array(found).reshape(layers, experts), _CERTAIN)
