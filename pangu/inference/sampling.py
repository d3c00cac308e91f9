"""From logits to the next token."""

from __future__ import annotations

import torch


def probabilities(logits: torch.Tensor, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    """Distribution `[vocab]` over the next token; logits `[vocab]`.

    `top_p` keeps the fewest most likely tokens whose probabilities reach it together (nucleus
    sampling, arXiv 1904.09751), renormalised. Temperature 0 puts everything on the most likely.
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(0, logits.argmax(dim=0, keepdim=True), 1.0)
    values, order = (logits.double() / temperature).softmax(dim=0).sort(descending=True)
    before = values.cumsum(dim=0) - values  # probability of the more likely tokens
    kept = values.where(before < top_p, 0.0)
    kept[0] = values[0]
    return torch.zeros_like(values).scatter_(0, order, kept / kept.sum())


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens."""

    def __init__(self, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token; logits `[vocab]` on any device."""
        weights = probabilities(logits.float().cpu(), self.temperature, self.top_p)
        return int(torch.multinomial(weights, 1, generator=self._generator))
