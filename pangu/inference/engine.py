"""The decoding engine: requests in, tokens and text out, many sequences in one pass.

Every rank of a model in several processes runs the same engine with the same requests; rank 0
draws for all. With replicas each has an engine and requests of its own. A sequence's tokens do not
depend on what else is decoded: passes of other sizes may differ in a logit's last bits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.models.gpt import GPTModel

from pangu.data.tokenizer import Tokenizer
from pangu.inference import batching
from pangu.inference.batching import Request, Scheduler, Work
from pangu.inference.cache import KeyValues, PagePool
from pangu.inference.cached_pass import CachedPass, Segment
from pangu.inference.draft_length import Counts, DraftLength, Prior
from pangu.inference.drawing import NO_TOKEN, Likely, drawn_of, likely, rows_of
from pangu.inference.forward import Forward
from pangu.inference.leap_drafts import LeapDrafter
from pangu.inference.replicas import Replica
from pangu.inference.speculative import Draft, Drafter, MtpDrafter
from pangu.inference.text import StoppedText
from pangu.inference.touched_experts import TouchedExperts
from pangu.inference.tree import WIDTH, Accuracies, grown

_NOTHING = -2  # a guess did not hold


class NotFinite(ArithmeticError):
    """A model whose predictions are no numbers: nothing can be drawn from them."""

    def __init__(self) -> None:
        super().__init__("the model's predictions are not finite numbers")


@dataclass
class Update:
    """What a step has added to a request.

    `finish`: "" while it goes on, then "stop", "length" or "not finite". `reused`: tokens of its
    prompt that were in the cache already.
    """

    number: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Likely] = field(default_factory=list)
    finish: str = ""
    reused: int = 0


class Engine:
    """Decodes for a model; the calls must be the same on all ranks.

    `drafter` guesses `draft_tokens` tokens for each sequence and pass, when it is set; with
    `draft_length`, as many as that says pay. Guesses whose number depends on the clock must not
    draw from a request's random numbers: then `drafter.draws` is False. `touched_experts` counts
    the experts of rounds, and with `tree` drafts branch, when these are set.

    Args:
        vocab_size: tokens from there on, which fill up the model's vocabulary, are never drawn.
        tokenizer: for texts and stop strings; without it there are tokens alone.
        cache_tokens: how many tokens' keys and values are kept, of all sequences together.
        max_sequences: how many sequences run at a time.
        max_batch_tokens: how many tokens a pass computes at most.
    """

    def __init__(
        self,
        model: GPTModel,
        *,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        cache_tokens: int = 16384,
        page_size: int = 16,
        max_sequences: int = 64,
        max_batch_tokens: int = 512,
        prefix_reuse: bool = True,
        replica: Replica | None = None,
    ) -> None:
        self.replica, self._forward = replica, Forward(model, replica)
        self._vocab_size, self.tokenizer = vocab_size, tokenizer
        self.store = KeyValues(-(-cache_tokens // page_size) * page_size)
        self.scheduler = Scheduler(
            PagePool(-(-cache_tokens // page_size), page_size),
            max_sequences=max_sequences,
            max_tokens=max(max_batch_tokens, max_sequences),
            prefix_reuse=prefix_reuse,
        )
        self._sequences: dict[int, batching.Sequence] = {}
        self._texts: dict[int, StoppedText] = {}
        self._numbers = itertools.count()
        self.drafter: Drafter | None = None
        self.draft_tokens = 0
        self.draft_length: DraftLength | None = None
        self._chosen = 0  # guesses, by `draft_length`
        self.touched_experts: TouchedExperts | None = None
        self.tree: Accuracies | None = None
        self.counts = Counts()

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return bool(self._sequences)

    def add(self, request: Request) -> int:
        """Queue a request and return its number.

        Raises:
            ValueError: it has no prompt, or does not fit into the cache.
        """
        if not request.prompt:
            raise ValueError("a prompt has one token at least")
        number = next(self._numbers)
        sequence = batching.Sequence(number, request)
        self.scheduler.add(sequence)
        self._sequences[number] = sequence
        if self.tokenizer:
            self._texts[number] = StoppedText(self.tokenizer, request.stop)
        return number

    def count_experts(self) -> None:
        """Count the experts that rounds of decoding touch."""
        self.touched_experts = TouchedExperts(self._forward.model)

    def branch_drafts(self) -> None:
        """Let drafts be trees of `draft_tokens` guesses, the likeliest by what has held."""
        assert self.drafter is not None
        self.drafter.draws, self.drafter.width = False, WIDTH
        self.tree = Accuracies()

    def adapt_drafts(self, prior: Prior | None = None) -> None:
        """Choose the number of guesses for each pass, up to `draft_tokens`, by what passes take;
        `prior` expects it of what was not measured yet. Trees bring what is expected of their
        branches."""
        assert self.drafter is not None
        self.drafter.draws = False
        drafter, tree = self.drafter, self.tree

        def of_tree(nodes: int) -> float:
            assert tree is not None
            return tree.expected(nodes, min(nodes, drafter.deepest), drafter.independent)

        measured, tokens = self.counts.measured, of_tree if tree is not None else None
        self.draft_length = DraftLength(measured, self.draft_tokens, prior, tokens)

    def draft_by_itself(self) -> None:
        """Let the model's leap heads guess, or its layers of multi-token prediction.

        Raises:
            ValueError: it has neither, or ranks have parts of sequences.
        """
        if self._forward.leaps[0]:
            self.drafter = LeapDrafter(self._forward, self._vocab_size)
            self.draft_tokens = self.drafter.deepest
            return
        depths = self._forward.depths
        if not depths:
            raise ValueError(
                "the model has no layers of multi-token prediction and no leap heads that could "
                "guess"
            )
        self.drafter = MtpDrafter(self._forward, self.store, self.scheduler, self._vocab_size)
        self.draft_tokens = depths

    def cancel(self, number: int) -> None:
        """Drop a request; there is no further update of it."""
        self._end(number)

    def forget(self) -> None:
        """Keep nothing for requests to come: the model's weights have changed. None is under
        way."""
        self.scheduler.pool.forget()
        self._forward.packed.forget()

    def step(self) -> list[Update]:
        """One pass of the model, and what it has added to which requests. Collective."""
        started = time.perf_counter()
        drafts = self._drafts()
        drafted = time.perf_counter()
        works = self.scheduler.plan({sequence: d.tokens for sequence, d in drafts.items()})
        if not works:
            return []
        if self.touched_experts:
            self.touched_experts.take()  # those of layers that guess
        guesses = [drafts.get(w.sequence, Draft()).cut(len(w.draft)) for w in works]
        cached = self._pass_of(works, guesses)
        tokens = [token for work in works for token in work.tokens]
        logits = self._forward(tokens, cached)[:, : self._vocab_size]
        passed = time.perf_counter()
        drawn = self._agreed(works, drawn_of(works, guesses, logits))
        self._keep(works, guesses, drawn, cached)
        self._measure(works, drawn, (started, drafted, passed, time.perf_counter()))
        updates = []
        parts = logits.split([rows_of(work) for work in works])
        for work, draft, rows, tokens in zip(works, guesses, parts, drawn, strict=True):
            sequence = work.sequence
            self.scheduler.advance(sequence, len(work.tokens) - len(work.draft))
            if work.last:
                self.counts.add(len(draft), len(tokens))
                updates.append(self._updated(sequence, tokens, rows))
                if not updates[-1].finish:
                    self.scheduler.advance(sequence, len(tokens) - 1)
        self.counts.passes += 1
        return updates

    def _measure(
        self,
        works: Sequence[Work],
        drawn: Sequence[Sequence[int]],
        moments: tuple[float, float, float, float],
    ) -> None:
        """A pass that decodes and reads no prompts is a round; `moments`: before it, once drafts
        were made, the pass had ended, and tokens were drawn."""
        guesses = sum(len(work.draft) for work in works)
        if sum(len(work.tokens) for work in works) != guesses + len(works):
            return
        draft, verify, reject = (end - start for start, end in itertools.pairwise(moments))
        length = round(guesses / len(works))
        found = self.counts.measured.round_of(len(works), length)
        found.add(draft, verify, reject, sum(map(len, drawn)))
        if self.draft_length:
            # A tree has often not the candidates for all the guesses that were chosen.
            asked = self._chosen if guesses and self.tree is not None else length
            self.draft_length.saw(len(works), asked, draft + verify + reject)
        experts = self.touched_experts.take() if self.touched_experts else None
        if experts is not None:
            found.experts, found.expert_rounds = found.experts + experts, found.expert_rounds + 1

    def _drafts(self) -> dict[batching.Sequence, Draft]:
        """Guesses for sequences that decode: no more than may still follow, but for the token that
        the model adds itself."""
        if self.drafter is None:
            return {}
        decoding = [sequence for sequence in self.scheduler.running if sequence.pending == 1]
        most = self.draft_tokens
        if self.draft_length and decoding:
            (most,) = self._forward.agreed([self.draft_length.choose(len(decoding))])
            self._chosen = most
        shape: Sequence[tuple[int, int, int]] = ()
        if self.tree is not None:
            deepest = min(most, self.drafter.deepest)
            shape = self.tree.tree(most, deepest, self.drafter.independent)
            most = max((depth for depth, _, _ in shape), default=0)
        room = {s: s.request.max_new_tokens - s.new_tokens - 1 for s in decoding}
        found = self.drafter.propose({s: min(most, left) for s, left in room.items() if left > 0})
        if self.tree is None:
            return found
        return {
            sequence: replace(draft, tokens=tokens, parents=parents).cut(room[sequence])
            for sequence, draft in found.items()
            for tokens, parents in [grown(shape, draft.candidates)]
        }

    def _pass_of(self, works: Sequence[Work], drafts: Sequence[Draft]) -> CachedPass:
        """The pass that computes the works: its logits are those of each sequence whose end it
        reaches, before all guesses and behind each."""
        segments = [
            Segment(work.sequence.computed, len(work.tokens), work.sequence.pages, draft.parents)
            for work, draft in zip(works, drafts, strict=True)
        ]
        ends = itertools.accumulate(len(work.tokens) for work in works)
        rows = [
            row
            for work, end in zip(works, ends, strict=True)
            for row in range(end - rows_of(work), end)
        ]
        return CachedPass(self.store, self.scheduler.pool.page_size, segments, rows)

    def _keep(
        self,
        works: Sequence[Work],
        drafts: Sequence[Draft],
        drawn: Sequence[Sequence[int]],
        cached: CachedPass,
    ) -> None:
        """Let the guesses that held stand behind the text, in the cache and for the drafter."""
        if self.drafter is None or cached.hidden is None:
            return
        hidden, first = [], 0
        for work, draft, tokens in zip(works, drafts, drawn, strict=True):
            certain = len(work.tokens) - len(work.draft)
            path = draft.path(tokens[:-1])
            rows = [*range(certain), *(certain + node for node in path)]
            hidden.append(cached.hidden[[first + row for row in rows]])
            first += len(work.tokens)
            start = work.sequence.computed
            if rows != list(range(len(rows))):
                sources, targets = ([start + r for r in some] for some in (rows, range(len(rows))))
                self.store.move(*(self._slots(work.sequence, part) for part in (sources, targets)))
            if self.tree is not None and draft.candidates:
                self.tree.saw(draft.candidates, tokens, self.drafter.independent)
        self.drafter.saw(works, hidden)

    def _slots(self, sequence: batching.Sequence, positions: Sequence[int]) -> list[int]:
        size = self.scheduler.pool.page_size
        return [sequence.pages[at // size] * size + at % size for at in positions]

    def _agreed(self, works: Sequence[Work], drawn: Sequence[Sequence[int]]) -> list[list[int]]:
        """What rank 0 has drawn for each work, on all ranks."""
        filled = [
            token
            for work, tokens in zip(works, drawn, strict=True)
            for token in [*tokens, *[_NOTHING] * (rows_of(work) - len(tokens))]
        ]
        agreed = iter(self._forward.agreed(filled))
        rows = [list(itertools.islice(agreed, rows_of(work))) for work in works]
        return [[token for token in row if token != _NOTHING] for row in rows]

    def _updated(
        self, sequence: batching.Sequence, tokens: Sequence[int], logits: torch.Tensor
    ) -> Update:
        """A sequence with more tokens; those after its end are dropped. logits `[rows, vocab]`"""
        request, update = sequence.request, Update(sequence.number, reused=sequence.reused)
        text = self._texts.get(sequence.number)
        for token, row in zip(tokens, logits, strict=False):
            if token == NO_TOKEN:  # what rank 0 found
                update.finish = "not finite"
            elif token in request.stop_tokens:
                update.finish = "stop"
            else:
                sequence.tokens.append(token)
                update.tokens.append(token)
                update.text += text.push(token) if text else ""
                if request.logprobs is not None:
                    update.logprobs.append(likely(row, token, request.logprobs))
                if text and text.ended:
                    update.finish = "stop"
                elif sequence.new_tokens == request.max_new_tokens:
                    update.finish = "length"
            if update.finish:
                update.text += text.flush() if text else ""
                self._end(sequence.number)
                break
        return update

    def _end(self, number: int) -> None:
        sequence = self._sequences.pop(number, None)
        self._texts.pop(number, None)
        if sequence is not None:
            self.scheduler.remove(sequence)


def generate(model: GPTModel, request: Request, vocab_size: int) -> Iterator[int]:
    """One request's new tokens, one by one. Collective.

    Raises:
        NotFinite: on every rank, when rank 0 finds a logit that is no finite number.
    """
    longest = len(request.prompt) + request.max_new_tokens
    engine = Engine(model, vocab_size=vocab_size, cache_tokens=longest, prefix_reuse=False)
    engine.add(request)
    while engine.busy:
        for update in engine.step():
            yield from update.tokens
            if update.finish == "not finite":
                raise NotFinite
