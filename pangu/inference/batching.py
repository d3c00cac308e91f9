"""Which tokens of which sequences the next pass computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from pangu.inference.cache import OutOfPages, PagePool, page_name
from pangu.inference.sampling import Draws, Sampling


@dataclass(frozen=True)
class Request:
    """What to go on from, how, and until when.

    `stop_tokens` end the text and do not belong to it, nor does any of the strings `stop`.
    `logprobs`: how many of the most likely tokens to report beside each; None for no report.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


class Sequence:
    """A request under way: its text so far, and how much of it is in the cache."""

    def __init__(self, number: int, request: Request) -> None:
        self.number, self.request = number, request
        self.tokens = list(request.prompt)
        self.draws = Draws(request.sampling.seed)
        self.computed = 0  # tokens whose keys and values are in `pages`
        self.pages: list[int] = []
        self.drafted = 0  # tokens whose keys and values a draft model has
        self.reused = 0  # tokens found in the cache when the sequence was first admitted
        self._names: list[bytes] = []  # of the full pages of `tokens`

    @property
    def pending(self) -> int:
        """Tokens still to be computed before the next can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def page_names(self, page_size: int, tokens: int) -> list[bytes]:
        """Names of the full pages among the first `tokens` tokens."""
        for page in range(len(self._names), tokens // page_size):
            before = self._names[-1] if self._names else b""
            part = self.tokens[page * page_size : (page + 1) * page_size]
            self._names.append(page_name(before, part))
        return self._names[: tokens // page_size]


@dataclass
class Work:
    """Tokens of a sequence in the next pass, behind those that it has in the cache.

    `draft`: guesses of the tokens to come, the last of `tokens`, to be verified. `last`: the pass
    reaches the sequence's end, so that it predicts what comes next.
    """

    sequence: Sequence
    tokens: list[int]
    draft: list[int]
    last: bool


class Scheduler:
    """First come, first served; a sequence that is short of pages takes those of the youngest,
    which computes its tokens again later.

    `max_tokens` a pass: sequences that decode come first, prompts get what is left, in chunks.
    """

    def __init__(
        self, pool: PagePool, *, max_sequences: int, max_tokens: int, prefix_reuse: bool = True
    ) -> None:
        self.pool = pool
        self.max_sequences, self.max_tokens = max_sequences, max_tokens
        self.prefix_reuse = prefix_reuse
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            ValueError: it would not fit into the cache even alone.
        """
        longest = len(sequence.request.prompt) + sequence.request.max_new_tokens
        room = self.pool.count * self.pool.page_size
        if longest > room:
            raise ValueError(f"{longest} tokens do not fit into a cache of {room}")
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its pages serve others that begin alike."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self, drafts: Mapping[Sequence, SequenceOf[int]]) -> list[Work]:
        """The next pass, with guesses of sequences' next tokens."""
        budget, works = self.max_tokens, []
        for sequence in sorted(self.running, key=lambda sequence: sequence.pending > 1):
            if sequence not in self.running or budget <= 0:  # it was preempted meanwhile
                continue
            work = self._work(sequence, drafts.get(sequence, ()), budget)
            if self._make_room(sequence, sequence.computed + len(work.tokens)):
                works.append(work)
                budget -= len(work.tokens)
        works = [work for work in works if work.sequence in self.running]
        while budget > 0 and self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            work = self._work(sequence, (), budget)
            self._reserve(sequence, sequence.computed + len(work.tokens))
            works.append(work)
            budget -= len(work.tokens)
        return works

    def _work(self, sequence: Sequence, draft: SequenceOf[int], budget: int) -> Work:
        start, pending = sequence.computed, sequence.pending
        if pending > budget:
            return Work(sequence, sequence.tokens[start : start + budget], [], False)
        guesses = list(draft[: budget - pending])
        return Work(sequence, sequence.tokens[start:] + guesses, guesses, True)

    def _reserve(self, sequence: Sequence, tokens: int) -> None:
        while len(sequence.pages) * self.pool.page_size < tokens:
            after = sequence.pages[-1] if sequence.pages else None
            sequence.pages.append(self.pool.take(after))

    def reserve_spare(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for so many tokens of a sequence, unless somebody would have to give them up."""
        try:
            self._reserve(sequence, tokens)
        except OutOfPages:
            return False
        return True

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for so many tokens, at the expense of younger sequences; False when it is itself
        the youngest and has to wait."""
        while True:
            try:
                self._reserve(sequence, tokens)
                return True
            except OutOfPages:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    return False

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.drafted = [], 0, 0

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run if there is room for all of its text and one page more."""
        size = self.pool.page_size
        if self.prefix_reuse:
            # The last token is computed in any case: something has to predict the next.
            for name in sequence.page_names(size, len(sequence.tokens) - 1):
                page = self.pool.share(name)
                if page is None:
                    break
                sequence.pages.append(page)
        missing = -(-len(sequence.tokens) // size) - len(sequence.pages)
        if self.pool.available < missing + bool(self.running):
            self._give_back(sequence)
            return False
        sequence.computed = len(sequence.pages) * size
        if not sequence.new_tokens:
            sequence.reused = sequence.computed
        self.waiting.popleft()
        self.running.append(sequence)
        return True

    def advance(self, sequence: Sequence, tokens: int) -> None:
        """So many more of the sequence's tokens are in the cache, for good."""
        sequence.computed += tokens
        sequence.drafted = min(sequence.drafted, sequence.computed)
        if self.prefix_reuse:
            names = sequence.page_names(self.pool.page_size, sequence.computed)
            for page, name in zip(sequence.pages, names, strict=False):
                self.pool.name(page, name)
