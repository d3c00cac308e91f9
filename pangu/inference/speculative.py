"""Speculative decoding: guesses of the next tokens, which one pass of the model verifies.

What comes out is what plain decoding gives: with temperature 0, and with guesses that nothing was
drawn for, token for token with the same seed; else the same distribution (arXiv 2211.17192).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from megatron.core.models.gpt import GPTModel

from pangu.inference import tree
from pangu.inference.batching import Scheduler, Sequence, Work
from pangu.inference.cache import KeyValues
from pangu.inference.cached_pass import CachedPass, Segment
from pangu.inference.forward import Forward
from pangu.inference.replicas import Replica
from pangu.inference.sampling import Draws, Sampling, probabilities


@dataclass
class Draft:
    """Guesses of a sequence's next tokens, one after the other; or, with `parents`, a tree of them.

    `chances[i]` `[vocab]` (float64): what guess i was drawn from; empty when nothing was drawn.
    `candidates[i]`: tokens for place i, the likeliest, which is guess i, first; where they are
    asked for.
    """

    tokens: list[int] = field(default_factory=list)
    chances: list[torch.Tensor] = field(default_factory=list)
    candidates: list[list[int]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def cut(self, guesses: int) -> Draft:
        """The first so many."""
        parts = (self.tokens, self.chances, self.candidates, self.parents)
        return Draft(*(part[:guesses] for part in parts))  # type: ignore[arg-type]

    def child(self, node: int, token: int) -> int | None:
        """The guess `token` behind guess `node` (-1: behind the text)."""
        if not self.parents:
            following = self.tokens[node + 1 : node + 2]
            return node + 1 if following == [token] else None
        for other, parent in enumerate(self.parents):
            if parent == node and self.tokens[other] == token:
                return other
        return None

    def path(self, tokens: SequenceOf[int]) -> list[int]:
        """The guesses that `tokens` are, as far as they go."""
        found: list[int] = []
        for token in tokens:
            node = self.child(found[-1] if found else -1, token)
            if node is None:
                break
            found.append(node)
        return found

    def __len__(self) -> int:
        """Tokens in a row."""
        return max(tree.depths(self.parents), default=0) if self.parents else len(self.tokens)


class Drafter(ABC):
    """Guesses the next tokens of sequences of which one token is pending. Where `draws`, guesses of
    sampled requests are drawn from their random numbers; else they are the most likely tokens.

    `deepest`: guesses in a row at most. `width`: candidates for each place. They are `independent`
    where they stand whatever comes before them, and not for the likeliest tokens there alone.
    """

    draws = True
    deepest = 64
    width = 1
    independent = False

    @abstractmethod
    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, Draft]:
        """At most so many for each sequence, or nothing. Collective."""

    def saw(self, works: SequenceOf[Work], hidden: SequenceOf[torch.Tensor]) -> None:
        """What a pass of the model has made of each work's tokens, `[n, 1, H]`, guesses that did
        not hold left out; most do not care."""
        return


def verified(
    draft: Draft,
    logits: torch.Tensor,
    sampling: Sampling,
    draws: Draws,
    text: SequenceOf[int],
) -> list[int]:
    """The guesses that hold, and one token more, which the model has drawn itself.

    logits `[guesses + 1, vocab]`: the model's, before all guesses and behind each. A guess from
    the distribution q holds with probability min(1, p/q); in the place of the first that does not,
    a token is drawn from max(0, p - q). Where nothing was drawn, the model draws as ever and a
    guess holds if it is the same: as likely, and with the random numbers of plain decoding.
    """
    if not draft.chances:

        def drawn(row: int, before: list[int]) -> int:
            return draws.token(probabilities(logits[row], sampling, [*text, *before]))

        return followed(draft, drawn)
    found: list[int] = []
    for number, row in enumerate(logits):
        chances = probabilities(row, sampling, [*text, *found])
        if number == len(draft.tokens):
            return [*found, draws.token(chances)]
        guess = draft.tokens[number]
        if draws.uniform() * draft.chances[number][guess] < chances[guess]:
            found.append(guess)
        else:
            rest = (chances - draft.chances[number]).clamp_min(0)
            # Nothing is left where p = q up to rounding: then p is as good.
            return [*found, draws.token(rest if rest.sum() > 0 else chances)]
    raise ValueError(f"{len(logits)} rows of logits do not verify {len(draft.tokens)} guesses")


def followed(draft: Draft, choose: Callable[[int, list[int]], int]) -> list[int]:
    """Tokens that `choose` makes, by their row of logits and those before them, as long as there
    is such a guess."""
    found: list[int] = []
    node: int | None = -1
    while node is not None:
        found.append(choose(node + 1, found))
        node = draft.child(node, found[-1])
    return found


_Ends: TypeAlias = dict[tuple[int, ...], list[int]]  # by the tokens that end there


class NgramDrafter(Drafter):
    """Prompt look-up: what followed when the text's last tokens were there before, as late as
    possible; the longest match of `longest` to `shortest` tokens."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._ends: WeakKeyDictionary[Sequence, _Ends] = WeakKeyDictionary()
        self._known: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, Draft]:
        found = {}
        for sequence, count in counts.items():
            ends = self._known_ends(sequence)
            earlier = self._earlier(ends, sequence.tokens)
            if earlier:
                draft = Draft(sequence.tokens[earlier[-1] : earlier[-1] + count])
                if self.width > 1:
                    self._add_candidates(draft, ends, sequence.tokens)
                found[sequence] = draft
        return found

    def _add_candidates(self, draft: Draft, ends: _Ends, tokens: list[int]) -> None:
        """Beside each guess, what else has followed the tokens before it, the latest first."""
        last = tokens[-self._sizes[0] :]  # no more is compared
        for place, guess in enumerate(draft.tokens):
            before = [*last, *draft.tokens[:place]]
            others = [tokens[end] for end in reversed(self._earlier(ends, before))]
            draft.candidates.append(list(dict.fromkeys([guess, *others]))[: self.width])

    def _known_ends(self, sequence: Sequence) -> _Ends:
        tokens, ends = sequence.tokens, self._ends.setdefault(sequence, {})
        for end in range(self._known.get(sequence, 1), len(tokens)):
            for size in self._sizes:
                if end >= size:
                    found = ends.setdefault(tuple(tokens[end - size : end]), [])
                    found[:] = [*found[1 - tree.WIDTH :], end]
        self._known[sequence] = len(tokens)
        return ends

    def _earlier(self, ends: _Ends, tokens: list[int]) -> list[int]:
        """Where the last tokens, as many as possible, ended before; the latest last."""
        for size in self._sizes:
            if size <= len(tokens) and (found := ends.get(tuple(tokens[-size:]))):
                return found
        return []


class ModelDrafter(Drafter):
    """Guesses of a smaller model with the same tokens. Its keys and values lie under the same page
    numbers as the model's, in a store of their own."""

    def __init__(
        self,
        model: GPTModel,
        scheduler: Scheduler,
        vocab_size: int,
        replica: Replica | None = None,
    ) -> None:
        self._forward = Forward(model, replica)
        self._scheduler, self._vocab_size = scheduler, vocab_size
        self._store = KeyValues(scheduler.pool.count * scheduler.pool.page_size)
        # Where the last guesses of a sequence began, and what they were.
        self._guessed: WeakKeyDictionary[Sequence, tuple[int, list[int]]] = WeakKeyDictionary()

    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, Draft]:
        """Raw draws come from the request's own random numbers."""
        found = {
            sequence: Draft()
            for sequence, count in counts.items()
            if count and self._scheduler.reserve_spare(sequence, len(sequence.tokens) + count)
        }
        for sequence in found:
            self._forget_others(sequence)
        active = dict(found)
        while active:
            self._guess_once(active)
            active = {s: d for s, d in active.items() if len(d.tokens) < counts[s]}
        for sequence, draft in found.items():
            # The last guess has not been computed; whether the others hold is not known yet.
            sequence.drafted = len(sequence.tokens) + max(0, len(draft.tokens) - 1)
            self._guessed[sequence] = (len(sequence.tokens), list(draft.tokens))
        return found

    def _forget_others(self, sequence: Sequence) -> None:
        """Of a tree other guesses may have held than those that were computed."""
        start, guesses = self._guessed.get(sequence, (0, []))
        came = zip(guesses, sequence.tokens[start:], strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], came))
        if guesses:
            sequence.drafted = min(sequence.drafted, start + same)

    def _guess_once(self, drafts: dict[Sequence, Draft]) -> None:
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
        guess(drafts, logits[:, : self._vocab_size], self, self._forward)


def joined(
    known: tuple[int, torch.Tensor] | None, start: int, part: torch.Tensor
) -> tuple[int, torch.Tensor]:
    """The position of the first, and hidden states of positions in a row: those `known`, as far as
    they lead up to `start`, then those of `part` `[n, 1, H]`."""
    if known is None or not known[0] <= start <= known[0] + len(known[1]):
        return start, part
    return known[0], torch.cat([known[1][: start - known[0]], part])


class MtpDrafter(Drafter):
    """Guesses of the model's own layers of multi-token prediction, one for each layer. Their keys
    and values lie beside the model's, under layer numbers of their own.

    Depth k at position i takes depth k - 1 at i and token i + k. What was computed with guesses
    that did not hold is computed again with the tokens that came: the last positions, one less
    than there are depths. Where a prefix was found in the cache, so were its keys.
    """

    def __init__(
        self, forward: Forward, store: KeyValues, scheduler: Scheduler, vocab_size: int
    ) -> None:
        self._forward, self._store = forward, store
        self.deepest = forward.depths
        self._page_size, self._vocab_size = scheduler.pool.page_size, vocab_size
        # Hidden states of a position and those behind it; how many positions are in the cache.
        self._hidden: WeakKeyDictionary[Sequence, tuple[int, torch.Tensor]] = WeakKeyDictionary()
        self._done: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def saw(self, works: SequenceOf[Work], hidden: SequenceOf[torch.Tensor]) -> None:
        for work, part in zip(works, hidden, strict=True):
            sequence, start = work.sequence, work.sequence.computed
            self._hidden[sequence] = joined(self._hidden.get(sequence), start, part)
            self._done[sequence] = min(self._done.get(sequence, 0), start)

    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, Draft]:
        segments, states, ready = [], [], []
        overlap = self._forward.depths - 1
        for sequence in counts:
            first, known = self._hidden[sequence]
            start = max(first, self._done[sequence] - overlap)
            end = sequence.computed
            segments.append(Segment(start, end - start, sequence.pages))
            states.append(known[start - first : end - first])
            ready.append(sequence)
            kept = max(first, end - overlap)
            self._hidden[sequence] = (kept, known[kept - first : end - first])
            self._done[sequence] = end
        found = {sequence: Draft() for sequence in ready}
        if not found:
            return found
        ends = torch.tensor([segment.count for segment in segments]).cumsum(0) - 1
        cached = CachedPass(self._store, self._page_size, segments, ends.tolist())
        hidden = torch.cat(states)
        for depth in range(1, min(self._forward.depths, max(counts.values())) + 1):
            tokens = []
            for (sequence, draft), segment in zip(found.items(), segments, strict=True):
                text = [*sequence.tokens, *draft.tokens]
                first = segment.start + depth
                tokens += text[first : first + segment.count]
            hidden, logits = self._forward.predict_further(depth, hidden, tokens, cached)
            guess(found, logits[:, : self._vocab_size], self, self._forward)
        for sequence, draft in found.items():
            found[sequence] = draft.cut(counts[sequence])
        return found


def guess(
    drafts: dict[Sequence, Draft], logits: torch.Tensor, drafter: Drafter, forward: Forward
) -> None:
    """One more guess for each, if the drafter draws as its request has it drawn; logits
    `[drafts, vocab]`."""
    guesses = []
    for (sequence, draft), row in zip(drafts.items(), logits.cpu(), strict=True):
        sampling = sequence.request.sampling
        if sampling.temperature == 0 or not drafter.draws:
            guesses.append(int(row.argmax()))
            continue
        chances = probabilities(row, sampling, [*sequence.tokens, *draft.tokens])
        guesses.append(sequence.draws.token(chances))
        draft.chances.append(chances)
    for draft, guess in zip(drafts.values(), forward.agreed(guesses), strict=True):
        draft.tokens.append(guess)
    if drafter.width > 1:
        likely = logits.topk(drafter.width, dim=1).indices.flatten().tolist()
        rows = iter(forward.agreed(likely))
        for draft in drafts.values():
            others = itertools.islice(rows, drafter.width)
            draft.candidates.append(
                list(dict.fromkeys([draft.tokens[-1], *others]))[: drafter.width]
            )
