"""Distributions against probabilities by hand and transformers' own processors."""

import pytest
import torch

from pangu.inference.sampling import Draws, Sampling, probabilities

FOUR = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    def kept(top_p):
        return probabilities(FOUR, Sampling(top_p=top_p)).tolist()

    assert kept(1.0) == pytest.approx([0.15, 0.5, 0.05, 0.3])
    assert kept(0.9) == pytest.approx([0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95])
    assert kept(0.79) == pytest.approx([0, 0.625, 0, 0.375])
    assert kept(0.5 - 1e-6) == [0, 1, 0, 0]
    assert kept(0.0) == [0, 1, 0, 0]


def test_temperature_sharpens_and_zero_is_greedy():
    logits = torch.tensor([0.2, 0.8]).log()
    assert probabilities(logits, Sampling(temperature=0.5)).tolist() == pytest.approx(
        [1 / 17, 16 / 17]
    )
    assert probabilities(logits, Sampling(temperature=0)).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("flat", [False, True])  # flat: more than the likely tokens are needed
def test_all_filters_together_are_those_of_transformers(seed, flat):
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as theirs

    sampling = Sampling(
        repetition_penalty=1.3,
        temperature=0.7,
        top_k=0 if flat else 50,
        top_p=0.95,
        min_p=0.01 if flat else 0.05,
    )
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(seed)).double()
    logits *= 0.3 if flat else 2
    text = [7, 7, 3, 4999, 12]
    steps = [
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.TemperatureLogitsWarper(0.7),
        *([] if flat else [theirs.TopKLogitsWarper(50)]),
        theirs.TopPLogitsWarper(0.95),
        theirs.MinPLogitsWarper(sampling.min_p),
    ]
    expected = LogitsProcessorList(steps)(torch.tensor([text]), logits[None])[0].softmax(0)
    found = probabilities(logits, sampling, text)
    assert (found > 0).sum() > (1024 if flat else 2)
    torch.testing.assert_close(found, expected)


def test_draws_follow_the_distribution_and_the_seed():
    distribution = probabilities(FOUR, Sampling(top_p=0.79))

    def draw(seed):
        draws = Draws(seed)
        return [draws.token(distribution) for _ in range(2000)]

    first = draw(seed=3)
    assert first == draw(seed=3) != draw(seed=4)
    assert set(first) == {1, 3}
    assert first.count(1) / 2000 == pytest.approx(0.625, abs=0.04)  # four standard deviations


def test_a_number_at_the_very_end_draws_a_token_that_can_be_drawn(monkeypatch):
    draws = Draws(0)
    monkeypatch.setattr(draws, "uniform", lambda: 1.0)
    assert draws.token(torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)) == 1
    monkeypatch.setattr(draws, "uniform", lambda: 0.0)
    assert draws.token(torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)) == 1
