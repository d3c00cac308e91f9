"""The decoding engine: requests in, tokens and text out, many sequences in one pass.

Every rank of a model in several processes runs the same engine with the same requests; rank 0
draws for all. A sequence's tokens do not depend on what else is decoded: passes of other sizes may
differ in a logit's last bits, never in which numbers they add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from pangu import backends
from pangu.data.tokenizer import Tokenizer
from pangu.inference import batching
from pangu.inference.batching import Request, Scheduler, Work
from pangu.inference.cache import CachedPass, KeyValues, PagePool, Segment
from pangu.inference.forward import Forward
from pangu.inference.sampling import probabilities
from pangu.inference.text import StoppedText

_NO_TOKEN = -1


class NotFinite(ArithmeticError):
    """A model whose predictions are no numbers: nothing can be drawn from them."""

    def __init__(self) -> None:
        super().__init__("the model's predictions are not finite numbers")


@dataclass(frozen=True)
class Likely:
    """A token's log-probability in the model, before any temperature, and the most likely ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Update:
    """What a step has added to a request.

    `finish`: "" while it goes on, then "stop", "length" or "not finite".
    """

    number: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Likely] = field(default_factory=list)
    finish: str = ""


class Engine:
    """Decodes for a model; the calls must be the same on all ranks.

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
    ) -> None:
        self._forward = Forward(model)
        self._vocab_size, self._tokenizer = vocab_size, tokenizer
        self._store = KeyValues(-(-cache_tokens // page_size) * page_size)
        self.scheduler = Scheduler(
            PagePool(-(-cache_tokens // page_size), page_size),
            max_sequences=max_sequences,
            max_tokens=max(max_batch_tokens, max_sequences),
            prefix_reuse=prefix_reuse,
        )
        self._sequences: dict[int, batching.Sequence] = {}
        self._texts: dict[int, StoppedText] = {}
        self._numbers = itertools.count()

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
        if self._tokenizer:
            self._texts[number] = StoppedText(self._tokenizer, request.stop)
        return number

    def cancel(self, number: int) -> None:
        """Drop a request; there is no further update of it."""
        self._end(number)

    def reused_tokens(self, number: int) -> int:
        """Tokens of a running request's prompt that were in the cache already."""
        return self._sequences[number].reused

    def step(self) -> list[Update]:
        """One pass of the model, and what it has added to which requests. Collective."""
        works = self.scheduler.plan()
        if not works:
            return []
        logits = self._logits(works)
        updates, row = [], 0
        drawn = self._drawn(works, logits)
        for work, token in zip(works, drawn, strict=True):
            self.scheduler.advance(work.sequence, len(work.tokens))
            if work.last:
                updates.append(self._updated(work.sequence, [token], logits[row : row + 1]))
                row += 1
        return updates

    def _logits(self, works: Sequence[Work]) -> torch.Tensor:
        """Of each sequence whose end the pass reaches: `[sequences, vocab]`."""
        segments = [
            Segment(work.sequence.computed, len(work.tokens), work.sequence.pages) for work in works
        ]
        ends = itertools.accumulate(len(work.tokens) for work in works)
        rows = [end - 1 for work, end in zip(works, ends, strict=True) if work.last]
        page_size = self.scheduler.pool.page_size
        cached = CachedPass(self._store, page_size, segments, rows)
        tokens = [token for work in works for token in work.tokens]
        return self._forward(tokens, cached)[:, : self._vocab_size]

    def _drawn(self, works: Sequence[Work], logits: torch.Tensor) -> list[int]:
        """A token for each work that reaches its sequence's end, the same on all ranks."""
        most_likely = logits.argmax(dim=1).tolist()
        finite = logits.float().sum(dim=1).isfinite().tolist()
        tokens, row = [], 0
        for work in works:
            tokens.append(_NO_TOKEN)
            if work.last:
                sequence, sampling = work.sequence, work.sequence.request.sampling
                if finite[row] and sampling.greedy:
                    tokens[-1] = most_likely[row]
                elif finite[row]:
                    chances = probabilities(logits[row].cpu(), sampling, sequence.tokens)
                    tokens[-1] = sequence.draws.token(chances)
                row += 1
        return _of_rank_0(tokens)

    def _updated(
        self, sequence: batching.Sequence, tokens: Sequence[int], logits: torch.Tensor
    ) -> Update:
        """A sequence with tokens more; those after its end are dropped. logits `[tokens, vocab]`"""
        request, update = sequence.request, Update(sequence.number)
        text = self._texts.get(sequence.number)
        for token, row in zip(tokens, logits, strict=True):
            if token == _NO_TOKEN:
                update.finish = "not finite"
            elif token in request.stop_tokens:
                update.finish = "stop"
            else:
                sequence.tokens.append(token)
                update.tokens.append(token)
                update.text += text.push(token) if text else ""
                if request.logprobs is not None:
                    update.logprobs.append(_likely(row, token, request.logprobs))
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


def _likely(logits: torch.Tensor, token: int, count: int) -> Likely:
    """logits `[vocab]`"""
    logprobs = logits.float().log_softmax(dim=0)
    values, order = logprobs.topk(min(count, logprobs.numel()))
    top = tuple(zip(order.tolist(), values.tolist(), strict=True))
    return Likely(token, float(logprobs[token]), top)


def _of_rank_0(tokens: list[int]) -> list[int]:
    if dist.get_world_size() == 1:
        return tokens
    chosen = torch.tensor(tokens, device=backends.current().device)
    dist.broadcast(chosen, 0)
    return chosen.tolist()


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
