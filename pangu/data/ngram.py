"""Unigram and bigram models of the training tokens: the baselines that a language model must beat.

Both are smoothed, with their constants chosen on a tenth of the training tokens, so that they are
no straw men. Losses are in nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ADD = (1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0)
_DISCOUNTS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)


def ngram_losses(
    train_tokens: np.ndarray, held_out_tokens: np.ndarray, vocab_size: int
) -> dict[str, float]:
    """Mean loss of both models on held-out tokens.

    Args:
        train_tokens: `[tokens]` or `[sequences, tokens]`; rows are separate texts.
        held_out_tokens: the same; the first token of each row is context only, so that a row of
            inputs and the last label is judged on the labels, as the language model is.
        vocab_size: number of possible tokens.

    Returns:
        `{"unigram": nats, "bigram": nats}`.
    """
    return NgramModels.fit(train_tokens, vocab_size).losses(held_out_tokens)


@dataclass(frozen=True)
class NgramModels:
    """Both models, fitted, with their smoothing constants."""

    counts: _Counts
    add: float
    discount: float

    @classmethod
    def fit(cls, train_tokens: np.ndarray, vocab_size: int) -> NgramModels:
        """Count `train_tokens`, `[tokens]` or `[sequences, tokens]`."""
        context, target = _pairs(train_tokens)
        tuning = _every_tenth_stretch(len(target))
        fitted = _Counts.of(context[~tuning], target[~tuning], vocab_size)
        probe = context[tuning], target[tuning]
        add = min(_ADD, key=lambda k: fitted.unigram_loss(probe[1], k))
        discount = min(_DISCOUNTS, key=lambda d: fitted.bigram_loss(*probe, add, d))
        return cls(_Counts.of(context, target, vocab_size), add, discount)

    def losses(self, tokens: np.ndarray) -> dict[str, float]:
        """`{"unigram": nats, "bigram": nats}`, the mean over the tokens after each row's first."""
        context, target = _pairs(tokens)
        return {
            "unigram": self.counts.unigram_loss(target, self.add),
            "bigram": self.counts.bigram_loss(context, target, self.add, self.discount),
        }


def _pairs(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.atleast_2d(tokens).astype(np.int64)
    return rows[:, :-1].ravel(), rows[:, 1:].ravel()


def _every_tenth_stretch(length: int) -> np.ndarray:
    """Mask `[length]` of the pairs to tune on: stretches, because neighbours are alike."""
    stretch = max(1, min(4096, length // 20))
    return np.arange(length) // stretch % 10 == 9


@dataclass(frozen=True)
class _Counts:
    tokens: np.ndarray  # [vocab] occurrences as target
    pairs: np.ndarray  # [distinct pairs] context * vocab + target, ascending
    occurrences: np.ndarray  # [distinct pairs]
    contexts: np.ndarray  # [vocab] occurrences as context
    followers: np.ndarray  # [vocab] distinct tokens seen after it

    @classmethod
    def of(cls, context: np.ndarray, target: np.ndarray, vocab_size: int) -> _Counts:
        pairs, occurrences = np.unique(context * vocab_size + target, return_counts=True)
        return cls(
            np.bincount(target, minlength=vocab_size),
            pairs,
            occurrences,
            np.bincount(context, minlength=vocab_size),
            np.bincount(pairs // vocab_size, minlength=vocab_size),
        )

    def _unigram(self, add: float) -> np.ndarray:
        """Add-k probabilities `[vocab]`."""
        return (self.tokens + add) / (self.tokens.sum() + add * len(self.tokens))

    def unigram_loss(self, target: np.ndarray, add: float) -> float:
        return float(-np.log(self._unigram(add)[target]).mean())

    def bigram_loss(
        self, context: np.ndarray, target: np.ndarray, add: float, discount: float
    ) -> float:
        """Interpolated absolute discounting: what is taken from seen pairs goes to the unigram."""
        keys = context * len(self.tokens) + target
        where = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        seen = np.where(self.pairs[where] == keys, self.occurrences[where], 0)
        total = self.contexts[context]
        kept = np.maximum(seen - discount, 0) / np.maximum(total, 1)
        freed = np.where(total > 0, discount * self.followers[context] / np.maximum(total, 1), 1.0)
        return float(-np.log(kept + freed * self._unigram(add)[target]).mean())
