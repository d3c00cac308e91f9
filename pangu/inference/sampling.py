"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

_LIKELY = 1024  # tokens that nearly always hold the nucleus; sorting all takes ten times as long


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn; in the order of these fields, as transformers does.

    `temperature` 0 takes the most likely token. `top_k` 0 and `top_p` 1 keep all tokens, `top_p`
    else the fewest most likely whose probabilities reach it together (nucleus sampling, arXiv
    1904.09751); `min_p` those that are at least so likely as a part of the most likely.
    `repetition_penalty` divides the positive logits of tokens that the text already holds and
    multiplies negative ones (arXiv 1909.05858).
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the next token is the largest logit's, whatever the text before it."""
        return self.temperature == 0 and self.repetition_penalty == 1


def probabilities(
    logits: torch.Tensor, sampling: Sampling, text: Iterable[int] = ()
) -> torch.Tensor:
    """Distribution `[vocab]` (float64) over the next token; logits `[vocab]`; `text`: the tokens
    that a repetition penalty counts."""
    logits = logits.double()
    if sampling.repetition_penalty != 1:
        logits = _penalised(logits, sampling.repetition_penalty, text)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(0, logits.argmax(dim=0, keepdim=True), 1.0)
    found = (logits / sampling.temperature).softmax(dim=0)
    if 0 < sampling.top_k < found.numel():
        found = _only(found, found.topk(sampling.top_k).indices)
    if sampling.top_p < 1:
        found = _only(found, _nucleus(found, sampling.top_p))
    if sampling.min_p > 0:
        found = found.where(found >= sampling.min_p * found.max(), 0.0)
        found = found / found.sum()
    return found


def _penalised(logits: torch.Tensor, penalty: float, text: Iterable[int]) -> torch.Tensor:
    seen = torch.tensor(sorted(set(text)), dtype=torch.long, device=logits.device)
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def _only(found: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The distribution of some tokens alone."""
    return torch.zeros_like(found).index_copy_(0, kept, found[kept] / found[kept].sum())


def _nucleus(found: torch.Tensor, top_p: float) -> torch.Tensor:
    values, order = found.topk(min(_LIKELY, found.numel()))
    if values.sum() < top_p:
        values, order = found.sort(descending=True)
    before = values.cumsum(dim=0) - values  # probability of the more likely tokens
    return order[: max(1, int((before < top_p).sum()))]


class Draws:
    """A request's random numbers: the same seed gives the same, whatever else is decoded."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self) -> float:
        """In [0, 1)."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def token(self, distribution: torch.Tensor) -> int:
        """A token by its probability, from one random number; distribution `[vocab]`, float64."""
        rising = distribution.cumsum(dim=0)
        at = torch.searchsorted(rising, self.uniform() * rising[-1], right=True)
        # Rounding may reach past the last token that can be drawn.
        last = int(distribution.nonzero()[-1]) if int(at) >= len(rising) else len(rising) - 1
        return min(int(at), last)
