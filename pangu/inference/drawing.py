"""From the logits of a pass to what follows in each of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pangu.inference.batching import Work
from pangu.inference.speculative import Draft, followed, verified

NO_TOKEN = -1  # no number is finite


@dataclass(frozen=True)
class Likely:
    """A token's log-probability in the model, before any temperature, and the most likely ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def rows_of(work: Work) -> int:
    """Rows of logits that a pass gives for it."""
    return len(work.draft) + 1 if work.last else 0


def drawn_of(
    works: Sequence[Work], drafts: Sequence[Draft], logits: torch.Tensor
) -> list[list[int]]:
    """What follows for each work that reaches its sequence's end: the guesses that hold, and a
    token more. logits `[rows, vocab]`, each work's behind those of the work before."""
    # All rows at once: a call takes longer than a row.
    wide = torch.promote_types(logits.dtype, torch.float32)
    finite = logits.sum(dim=1, dtype=wide).isfinite().tolist()
    greedy = any(work.last and work.sequence.request.sampling.greedy for work in works)
    likeliest = logits.argmax(dim=1).tolist() if greedy else []
    drawn: list[list[int]] = []
    first = 0
    for work, draft in zip(works, drafts, strict=True):
        rows = slice(first, first + rows_of(work))
        first = rows.stop
        if not work.last:
            drawn.append([])
        elif not all(finite[rows]):
            drawn.append([NO_TOKEN])
        elif work.sequence.request.sampling.greedy:
            drawn.append(_greedy(draft, likeliest[rows]))
        else:
            sequence, sampling = work.sequence, work.sequence.request.sampling
            own = logits[rows].cpu()
            drawn.append(verified(draft, own, sampling, sequence.draws, sequence.tokens))
    return drawn


def _greedy(draft: Draft, likeliest: Sequence[int]) -> list[int]:
    return followed(draft, lambda row, before: likeliest[row])


def likely(logits: torch.Tensor, token: int, count: int) -> Likely:
    """`count`: how many of the most likely to name beside it; logits `[vocab]`."""
    logprobs = logits.float().log_softmax(dim=0)
    values, order = logprobs.topk(min(count, logprobs.numel()))
    top = tuple(zip(order.tolist(), values.tolist(), strict=True))
    return Likely(token, float(logprobs[token]), top)
