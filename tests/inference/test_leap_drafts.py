"""Leap heads guess what the paper says, and the text stays that of plain decoding."""

import pytest
import torch
from test_speculative import PROMPTS, make, requests, watched
from tiny_models import KINDS, build, decode

from pangu.inference.batching import Request
from pangu.inference.leap_drafts import head_and_state
from pangu.inference.sampling import Sampling


def leaping(kind, heads=3, stride=2, *overrides):
    """A model whose heads say something each of their own."""
    settings = [f"model.leap_heads={heads}", f"model.leap_stride={stride}", *overrides]
    model = build(*KINDS[kind], *settings)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.leap_heads.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.5 * noise * max(float(parameter.data.std()), 0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "stride"), [(3, 2), (4, 1), (2, 3)])
def test_random_heads_change_no_token(kind, heads, stride):
    model = leaping(kind, heads, stride)
    expected = decode(make(model), requests(0))
    engine = make(model, "mtp")
    assert engine.draft_tokens == stride * (heads - 1)
    assert decode(engine, requests(0)) == expected
    assert engine.counts.guessed[engine.draft_tokens - 1] > 0
    engine = make(model, "mtp", cache_tokens=68, max_batch_tokens=7, max_sequences=4)
    assert decode(engine, requests(0)) == expected
    assert engine.scheduler.preemptions > 0
    decode(make(model, "mtp"), requests(0.8))


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_every_further_token_is_guessed_once_from_the_last_states(stride):
    for guess in range(1, 4 * stride + 1):
        head, back = head_and_state(guess, stride)
        assert 1 <= head <= 4
        assert 0 <= back < stride
        assert stride * head + 1 - back == guess + 1  # from the state before the last token
        if stride <= 2:  # the paper's: the j-th token, j - 1 = guess, from t - ((j - 1) mod k)
            assert back == guess % stride


def test_the_guesses_are_those_of_the_heads_on_whole_passes():
    model = leaping("moge", 3, 2)
    engine = make(model, "mtp", max_batch_tokens=9)
    seen = watched(engine)
    decode(engine, requests(0))
    assert len(seen) > 20
    for tokens, guesses in seen[::5]:
        ids = torch.tensor([tokens])
        positions = torch.arange(len(tokens))[None]
        with torch.no_grad():
            angles = model.rotary_pos_emb(len(tokens))
            hidden = model.decoder(model.embedding(ids, positions), None, rotary_pos_emb=angles)
            last = len(tokens) - 2
            wanted = [(1, last - 1), (1, last), (2, last - 1), (2, last)]
            rows = [model.leap_logits(h, hidden[at : at + 1]).argmax() for h, at in wanted]
        assert guesses == [int(row) for row in rows][: len(guesses)]


def test_heads_that_know_the_text_are_believed():
    """A model that says one token for ever, heads and all: every guess holds."""
    model = leaping("dense", 3, 2)
    assert model.share_embeddings_and_output_weights
    with torch.no_grad():
        model.embedding.word_embeddings.weight.zero_()  # the head's too: they are tied
        for head in model.leap_heads.children():
            head.output_layer.weight.zero_()
    engine = make(model, "mtp")
    asked = [Request(prompt, 20, Sampling(temperature=0)) for prompt in PROMPTS]
    assert decode(engine, asked) == [[0] * 20] * len(PROMPTS)
    assert engine.counts.guessed == engine.counts.held
