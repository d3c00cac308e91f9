"""What decoding has measured of drafts, and how long they should be by that.

Letters as in MoESD (arXiv 2505.19645): a round drafts γ tokens of each of B sequences, which one
pass verifies; T_T is a pass of the model, T_D the drafting of one token, T_reject the verification.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_TRUSTED = 3  # rounds after which a measured time is believed
_RECENT = 0.1  # weight of a new measurement
_TRIED_AGAIN = 64  # rounds without guesses, after which some are made to see what has changed

Prior = Callable[[int, int], float]  # seconds of a pass of so many sequences × tokens


@dataclass
class Round:
    """Sums over rounds of the same B and γ: seconds, tokens that came, experts touched per MoE
    layer, and how many rounds counted those."""

    count: int = 0
    draft: float = 0.0
    verify: float = 0.0
    reject: float = 0.0
    tokens: int = 0
    experts: float = 0.0
    expert_rounds: int = 0

    @property
    def seconds(self) -> float:
        return self.draft + self.verify + self.reject

    def add(self, draft: float, verify: float, reject: float, tokens: int) -> None:
        self.count += 1
        self.draft, self.verify = self.draft + draft, self.verify + verify
        self.reject, self.tokens = self.reject + reject, self.tokens + tokens


@dataclass
class Measured:
    """Rounds by (B, γ); and by place in a draft, how often a guess was reached, all before it
    having held, and how often it held too."""

    rounds: dict[tuple[int, int], Round] = field(default_factory=dict)
    reached: Counter[int] = field(default_factory=Counter)
    held: Counter[int] = field(default_factory=Counter)

    def saw_draft(self, guesses: int, held: int) -> None:
        """A draft of `guesses` tokens in a row, of which the first `held` were right."""
        self.reached.update(range(min(held + 1, guesses)))
        self.held.update(range(held))

    def round_of(self, sequences: int, guesses: int) -> Round:
        return self.rounds.setdefault((sequences, guesses), Round())

    def report(self, expected_experts: Callable[[int], float] | None = None) -> dict[str, Any]:
        """Everything, as JSON has it; means over rounds, seconds. `expected_experts`: N(t), the
        experts of a layer that t tokens touch if each chooses by itself."""
        places = sorted(self.reached)
        return {
            "acceptance": [self.held[place] / self.reached[place] for place in places],
            "rounds": [
                self._row(sequences, guesses, expected_experts)
                for sequences, guesses in sorted(dict(self.rounds))  # another thread may add one
            ],
        }

    def _row(
        self, sequences: int, guesses: int, expected: Callable[[int], float] | None
    ) -> dict[str, Any]:
        found = self.rounds[sequences, guesses]
        plain = self.rounds.get((sequences, 0))
        length = found.tokens / found.count / sequences
        row: dict[str, Any] = {
            "sequences": sequences,
            "guesses": guesses,
            "rounds": found.count,
            "accepted_length": length,
            "sigma": length / (guesses + 1),
            "T_T": found.verify / found.count,
            "T_D": found.draft / found.count / guesses if guesses else None,
            "T_reject": found.reject / found.count,
            "target_efficiency": None,
            "speedup": None,
        }
        if plain is not None:
            row["target_efficiency"] = plain.verify / plain.count / row["T_T"]
            rate = found.tokens / found.seconds
            row["speedup"] = rate / (plain.tokens / plain.seconds)
        if found.expert_rounds and expected:
            row["experts"] = found.experts / found.expert_rounds
            row["experts_expected"] = expected(sequences * (guesses + 1))
        return row


@dataclass
class Counts:
    """Of passes, tokens drawn, and guesses by their place in a draft: made, and found to hold."""

    passes: int = 0
    tokens: int = 0
    guessed: Counter[int] = field(default_factory=Counter)
    measured: Measured = field(default_factory=Measured)

    @property
    def held(self) -> Counter[int]:
        return self.measured.held

    def add(self, guesses: int, tokens: int) -> None:
        """A sequence's part of a pass: all tokens but the last were guesses that held."""
        self.tokens += tokens
        self.guessed.update(range(guesses))
        self.measured.saw_draft(guesses, tokens - 1)


class DraftLength:
    """γ for a batch: the one that brings most tokens a second, 0 where guesses do not pay.

    A round's seconds are measured for batches of about the same size (to the next power of two).
    Lengths that were not measured are expected to take what `prior` says of a pass, scaled to what
    was measured; without one, 0, 1, 2, 4 … guesses are tried first, and what lies between is
    interpolated. `tokens` says what a round of so many guesses brings a sequence; without it they
    stand in a row, and one in two is taken to hold before anything is known.
    """

    def __init__(
        self,
        measured: Measured,
        longest: int,
        prior: Prior | None = None,
        tokens: Callable[[int], float] | None = None,
    ) -> None:
        self._measured, self.longest, self._prior = measured, longest, prior
        self._tokens = tokens or self._in_a_row
        self._seconds: dict[int, dict[int, _Recent]] = {}  # by size of batch, by γ
        self._plain_rounds = 0

    def saw(self, sequences: int, guesses: int, seconds: float) -> None:
        """What a round took."""
        of_size = self._seconds.setdefault(_size(sequences), {})
        of_size.setdefault(guesses, _Recent()).add(seconds)

    def choose(self, sequences: int) -> int:
        """For the next round of `sequences` sequences."""
        known = self._seconds.get(_size(sequences), {})
        if self._prior is None:
            tries = {0, self.longest, *(2**power for power in range(self.longest.bit_length()))}
            for guesses in sorted(tries):
                if guesses not in known or known[guesses].count < _TRUSTED:
                    return guesses
        lengths = range(self.longest + 1)
        rates = [
            self._tokens(guesses) / self._expected(sequences, guesses, known) for guesses in lengths
        ]
        best = max(lengths, key=rates.__getitem__)
        self._plain_rounds = 0 if best else self._plain_rounds + 1
        if self._plain_rounds > _TRIED_AGAIN:
            self._plain_rounds = 0
            best = max(lengths[1:], key=rates.__getitem__)
        return best

    def _in_a_row(self, guesses: int) -> float:
        """Expected of a sequence in a round."""
        found, all_held = 1.0, 1.0
        for place in range(guesses):
            held, reached = self._measured.held[place], self._measured.reached[place]
            all_held *= (held + 1) / (reached + 2)
            found += all_held
        return found

    def _expected(self, sequences: int, guesses: int, known: dict[int, _Recent]) -> float:
        """Seconds of a round."""
        if self._prior is None:
            seconds = [known[length].seconds for length in sorted(known)]
            return float(np.interp(guesses, sorted(known), seconds))
        priors = {length: self._prior(sequences, length + 1) for length in known}
        prior = self._prior(sequences, guesses + 1)
        scale = sum(each.seconds for each in known.values()) / sum(priors.values()) if known else 1
        if guesses not in known:
            return scale * prior
        found = known[guesses]
        # The first rounds may have waited for something.
        trusted = found.count >= _TRUSTED
        return found.seconds if trusted else min(found.seconds, scale * prior)


def _size(sequences: int) -> int:
    return (sequences - 1).bit_length()


@dataclass
class _Recent:
    """A mean in which the last measurements weigh most; of the first ones it is the least."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.count <= _TRUSTED:
            self.seconds = min(seconds, self.seconds or seconds)
        else:
            self.seconds += (seconds - self.seconds) * _RECENT
