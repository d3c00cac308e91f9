"""How many guesses are made: by what was measured, never to another text."""

import itertools
import json

import pytest
from test_speculative import make, requests
from tiny_models import build, decode

from pangu.inference.draft_length import DraftLength, Measured
from simulator.moesd import sigma


def decoded_with(acceptance, seconds, rounds=300, prior=None, sequences=8, longest=6):
    """Choices of a decoder whose guesses hold and whose rounds last as told; acceptance by
    place, seconds by the number of guesses."""
    measured = Measured()
    length, chosen, owed = DraftLength(measured, longest, prior), [], [0.0] * longest
    for _ in range(rounds):
        guesses = length.choose(sequences)
        for _ in range(sequences):
            held = 0
            while held < guesses:
                owed[held] += acceptance[held]
                if owed[held] < 1:
                    break
                owed[held] -= 1
                held += 1
            measured.saw_draft(guesses, held)
        length.saw(sequences, guesses, seconds(guesses))
        chosen.append(guesses)
    return chosen


def best(acceptance, seconds):
    def rate(guesses):
        tokens, all_held = 1.0, 1.0
        for part in acceptance[:guesses]:
            all_held *= part
            tokens += all_held
        return tokens / seconds(guesses)

    return max(range(len(acceptance) + 1), key=rate)


@pytest.mark.parametrize(
    ("acceptance", "cost"),
    [
        ([0.9] * 6, 0.05),  # passes cost nearly the same: long drafts
        ([0.9, 0.5, 0.2, 0.1, 0.1, 0.1], 0.1),
        ([0.1] * 6, 0.5),  # guesses never pay
        ([0.6] * 6, 0.25),
    ],
)
def test_the_most_profitable_length_is_found(acceptance, cost):
    def seconds(guesses):
        return 1.0 + cost * guesses

    chosen = decoded_with(acceptance, seconds)
    wanted = best(acceptance, seconds)
    assert chosen[-100:].count(wanted) > 90, (wanted, chosen)
    if wanted == 0:  # tried again now and then, for things change
        assert 0 < sum(map(bool, chosen[-130:])) < 10


def test_a_prior_spares_the_trying():
    """Told what passes take, up to a factor, it never makes the guesses that cannot pay."""
    calls = []

    def prior(sequences, tokens):
        calls.append((sequences, tokens))
        return 7.0 * (1 + 2.0 * (tokens - 1))

    chosen = decoded_with([0.5] * 6, lambda guesses: 1 + 2.0 * guesses, 50, prior)
    assert set(chosen[1:]) == {0}
    assert (8, 7) in calls


def test_a_run_reports_what_moesd_asks_for():
    measured = Measured()
    for held in (0, 1, 2, 2):
        measured.saw_draft(2, held)
    plain, drafted = measured.round_of(2, 0), measured.round_of(2, 2)
    plain.add(0.0, 1.0, 0.1, 2)
    drafted.add(0.4, 1.25, 0.1, 5)
    drafted.experts, drafted.expert_rounds = 9.0, 2
    found = json.loads(json.dumps(measured.report(lambda tokens: float(tokens))))
    assert found["acceptance"] == [3 / 4, 2 / 3]
    row = found["rounds"][1]
    assert (row["T_T"], row["T_D"], row["T_reject"]) == (1.25, 0.2, 0.1)
    assert row["target_efficiency"] == pytest.approx(1 / 1.25)
    assert row["accepted_length"] == 2.5
    assert row["sigma"] == pytest.approx(2.5 / 3)
    assert row["speedup"] == pytest.approx((5 / 1.75) / (2 / 1.1))
    assert (row["experts"], row["experts_expected"]) == (4.5, 6.0)
    # Where every guess holds with the same chance, σ is the paper's.
    even = Measured()
    even.saw_draft(2, 2)
    even.round_of(1, 2).add(0, 1, 0, 3)
    assert even.report()["rounds"][0]["sigma"] == float(sigma(1.0, 2))


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_chosen_lengths_change_no_token(temperature):
    """Nor do they touch a request's random numbers: the clock must not write the text."""
    model, small = build(), build("model.num_layers=1", "seed=7")
    expected = decode(make(model), requests(temperature))
    for draft, branch in itertools.product(("ngram", small), (False, True)):
        engine = make(model, draft)
        engine.count_experts()
        if branch:
            engine.branch_drafts()
        engine.adapt_drafts()
        assert decode(engine, requests(temperature)) == expected
        report = engine.counts.measured.report(lambda tokens: 8.0)
        assert {row["guesses"] for row in report["rounds"]} > {0}
        assert all(0 < row["experts"] <= 8 for row in report["rounds"])
