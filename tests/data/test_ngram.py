"""The baselines against figures that are known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from pangu.data.ngram import _Counts, ngram_losses


def test_both_models_are_probability_distributions() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 7, 200)  # of a vocabulary of 9: two are never seen
    counts = _Counts.of(tokens[:-1], tokens[1:], 9)
    everything = np.arange(9)
    assert sum(np.exp(-counts.unigram_loss(np.array([t]), 0.5)) for t in everything) == (
        pytest.approx(1)
    )
    for context in everything:
        one = np.array([context])
        total = sum(np.exp(-counts.bigram_loss(one, np.array([t]), 0.5, 0.7)) for t in everything)
        assert total == pytest.approx(1)


def test_bigram_probability_by_hand() -> None:
    counts = _Counts.of(np.array([0, 0, 0, 1]), np.array([1, 1, 2, 0]), 3)
    # after 0: twice 1, once 2. discount 0.5 keeps 1.5/3 for 1 and frees 2 * 0.5/3 for the unigram
    unigram = np.array([1, 2, 1]) / 4
    expected = 1.5 / 3 + (1 / 3) * unigram[1]
    assert counts.bigram_loss(np.array([0]), np.array([1]), 0.0, 0.5) == (
        pytest.approx(-np.log(expected))
    )


def test_losses_of_independent_tokens_are_their_entropy() -> None:
    draw = np.random.default_rng(1)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    losses = ngram_losses(draw.choice(4, 200_000, p=p), draw.choice(4, 200_000, p=p), 4)
    entropy = -(p * np.log(p)).sum()
    assert losses["unigram"] == pytest.approx(entropy, rel=5e-3)
    assert losses["bigram"] == pytest.approx(entropy, rel=5e-3)


def test_losses_of_a_markov_chain() -> None:
    """Next token: the same again with 0.9, else any of the other three."""
    draw = np.random.default_rng(2)

    def chain(length: int) -> np.ndarray:
        steps = np.where(draw.random(length) < 0.9, 0, draw.integers(1, 4, length))
        return np.cumsum(steps) % 4

    losses = ngram_losses(chain(200_000), chain(200_000), 4)
    assert losses["unigram"] == pytest.approx(np.log(4), rel=5e-3)
    assert losses["bigram"] == pytest.approx(-0.9 * np.log(0.9) - 0.1 * np.log(0.1 / 3), rel=2e-2)


def test_rows_are_judged_on_their_labels_alone() -> None:
    train = np.array([0, 1] * 500)
    rows = np.array([[2, 1, 0], [2, 0, 1]])  # 2 is context only: never predicted
    losses = ngram_losses(train, rows, 3)
    assert losses["unigram"] == pytest.approx(np.log(2), abs=0.01)


def test_unseen_tokens_cost_much_but_not_infinitely() -> None:
    losses = ngram_losses(np.zeros(1000, dtype=np.uint16), np.full((1, 5), 3), 4)
    assert 5 < losses["unigram"] < 20
    assert 5 < losses["bigram"] < 20
