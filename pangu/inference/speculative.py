"""Speculative decoding: guesses of the next tokens, which one pass of the model verifies.

What comes out is what plain decoding gives: with temperature 0, and with guesses that nothing was
drawn for, token for token with the same seed; else the same distribution (arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from megatron.core.models.gpt import GPTModel

from pangu.inference.batching import Scheduler, Sequence
from pangu.inference.cache import CachedPass, KeyValues, Segment
from pangu.inference.forward import Forward, of_rank_0
from pangu.inference.sampling import Draws, Sampling, probabilities


@dataclass
class Draft:
    """Guesses of a sequence's next tokens. `chances[i]` `[vocab]` (float64): what guess i was drawn
    from; empty when nothing was drawn."""

    tokens: list[int] = field(default_factory=list)
    chances: list[torch.Tensor] = field(default_factory=list)


class Drafter(Protocol):
    """Guesses the next tokens of sequences of which one token is pending."""

    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, Draft]:
        """At most so many for each sequence, or nothing. Collective."""
        ...


def verified(
    draft: Draft,
    logits: torch.Tensor,
    sampling: Sampling,
    draws: Draws,
    text: SequenceOf[int],
) -> list[int]:
    """The guesses that hold, and one token more, which the model has drawn itself.

    logits `[guesses + 1, vocab]`: the model's, before each guess and behind the last. A guess from
    the distribution q holds with probability min(1, p/q); in the place of the first that does not,
    a token is drawn from max(0, p - q). Where nothing was drawn, the model draws as ever and a
    guess holds if it is the same: as likely, and with the random numbers of plain decoding.
    """
    found: list[int] = []
    for number, row in enumerate(logits):
        chances = probabilities(row, sampling, [*text, *found])
        if number == len(draft.tokens):
            return [*found, draws.token(chances)]
        guess = draft.tokens[number]
        if not draft.chances:
            found.append(draws.token(chances))
            if found[-1] != guess:
                return found
        elif draws.uniform() * draft.chances[number][guess] < chances[guess]:
            found.append(guess)
        else:
            rest = (chances - draft.chances[number]).clamp_min(0)
            # Nothing is left where p = q up to rounding: then p is as good.
            return [*found, draws.token(rest if rest.sum() > 0 else chances)]
    raise ValueError(f"{len(logits)} rows of logits do not verify {len(draft.tokens)} guesses")


class NgramDrafter:
    """Prompt look-up: what followed when the text's last tokens were there before, as late as
    possible; the longest match of `longest` to `shortest` tokens."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._ends: WeakKeyDictionary[Sequence, dict[tuple[int, ...], int]] = WeakKeyDictionary()
        self._known: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, Draft]:
        found = {}
        for sequence, count in counts.items():
            end = self._earlier(sequence)
            if end is not None:
                found[sequence] = Draft(sequence.tokens[end : end + count])
        return found

    def _earlier(self, sequence: Sequence) -> int | None:
        """Where the last tokens ended before."""
        tokens, ends = sequence.tokens, self._ends.setdefault(sequence, {})
        for end in range(self._known.get(sequence, 1), len(tokens)):
            for size in self._sizes:
                if end >= size:
                    ends[tuple(tokens[end - size : end])] = end
        self._known[sequence] = len(tokens)
        matches = (ends.get(tuple(tokens[-size:])) for size in self._sizes if size <= len(tokens))
        return next((end for end in matches if end is not None), None)


class ModelDrafter:
    """Guesses of a smaller model with the same tokens. Its keys and values lie under the same page
    numbers as the model's, in a store of their own."""

    def __init__(self, model: GPTModel, scheduler: Scheduler, vocab_size: int) -> None:
        self._forward = Forward(model)
        self._scheduler, self._vocab_size = scheduler, vocab_size
        self._store = KeyValues(scheduler.pool.count * scheduler.pool.page_size)

    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, Draft]:
        """Raw draws come from the request's own random numbers."""
        found = {
            sequence: Draft()
            for sequence, count in counts.items()
            if count and self._scheduler.reserve_spare(sequence, len(sequence.tokens) + count)
        }
        active = dict(found)
        while active:
            self._guess(active)
            active = {s: d for s, d in active.items() if len(d.tokens) < counts[s]}
        for sequence, draft in found.items():
            # The last guess has not been computed; whether the others hold is not known yet.
            sequence.drafted = len(sequence.tokens) + max(0, len(draft.tokens) - 1)
        return found

    def _guess(self, drafts: dict[Sequence, Draft]) -> None:
        """One more guess for each."""
        segments, fed = [], []
        for sequence, draft in drafts.items():
            text = [*sequence.tokens, *draft.tokens]
            start = len(text) - 1 if draft.tokens else min(sequence.drafted, len(text) - 1)
            segments.append(Segment(start, len(text) - start, sequence.pages))
            fed.append(text[start:])
        ends = torch.tensor([len(part) for part in fed]).cumsum(0) - 1
        page_size = self._scheduler.pool.page_size
        cached = CachedPass(self._store, page_size, segments, ends.tolist())
        logits = self._forward([token for part in fed for token in part], cached)
        guesses = []
        for (sequence, draft), row in zip(drafts.items(), logits.cpu(), strict=True):
            sampling = sequence.request.sampling
            if sampling.temperature == 0:
                guesses.append(int(row[: self._vocab_size].argmax()))
                continue
            text = [*sequence.tokens, *draft.tokens]
            chances = probabilities(row[: self._vocab_size], sampling, text)
            guesses.append(sequence.draws.token(chances))
            draft.chances.append(chances)
        for draft, guess in zip(drafts.values(), of_rank_0(guesses), strict=True):
            draft.tokens.append(guess)
