"""How likely a model finds a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel

from pangu.inference.forward import whole_logits
from pangu.inference.kept_results import Remember, anew


@dataclass(frozen=True)
class Likelihood:
    """Of `tokens` predicted tokens: the sum of -log p in nats, and its standard error from window
    to window (tokens of one window are not independent)."""

    nats: float
    tokens: int
    windows: int
    standard_error: float  # of the mean nats per token

    @property
    def perplexity(self) -> float:
        """exp of the mean nats per token."""
        return math.exp(self.nats / self.tokens)


def token_nats(model: GPTModel, ids: torch.Tensor) -> torch.Tensor:
    """-log p of each token but the first of its row: ids `[batch, seq]` → `[batch, seq - 1]`,
    float32."""
    with torch.no_grad():
        rows = whole_logits(model, ids)[:, :-1].flatten(0, 1)
    right = ids[:, 1:].flatten().to(rows.device)
    nats = torch.nn.functional.cross_entropy(rows, right, reduction="none")
    return nats.view(ids.size(0), -1)


def windows(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """Windows of `size` tokens one after the other, a shorter last one if it predicts anything."""
    cut = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [window for window in cut if len(window) > 1]


def text_likelihood(
    model: GPTModel,
    ids: Sequence[int],
    size: int,
    progress: Callable[[Iterable], Iterable] = iter,
    remember: Remember = anew,
) -> Likelihood:
    """Every token of `ids` but the first of each window of `size` tokens."""

    def nats(window: Sequence[int]) -> list[float]:
        return [token_nats(model, torch.tensor([window])).double().sum().item()]

    cut = windows(ids, size)
    counts = [len(window) - 1 for window in cut]
    sums = [remember(n, partial(nats, w))[0] for n, w in enumerate(progress(cut))]
    mean = sum(sums) / sum(counts)
    # The variance of a ratio of sums over windows.
    spread = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    error = math.sqrt(spread) / sum(counts) if len(sums) > 1 else float("nan")
    return Likelihood(sum(sums), sum(counts), len(sums), error)
