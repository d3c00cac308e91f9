"""Speculative decoding is plain decoding: token for token, or in distribution, exactly."""

import itertools
from collections import Counter

import gloo
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import KINDS, TINY, build, decode, prompts, whole_forward

from pangu.inference.batching import Request, Sequence
from pangu.inference.sampling import Draws, Sampling, probabilities
from pangu.inference.speculative import Draft, ModelDrafter, NgramDrafter, verified
from pangu.serving.metrics import Metrics

PROMPTS = prompts(6)
SMALLER = ["model.num_layers=1", "model.num_experts=0", "model.ffn_hidden_size=16"]


def make(model, draft=None, tokens=4, **settings):
    """An engine that looks up n-grams ("ngram"), or asks a model, or does neither."""
    from pangu.inference.engine import Engine

    engine = Engine(model, vocab_size=64, **{"cache_tokens": 512, "page_size": 4} | settings)
    engine.draft_tokens = tokens
    if draft == "ngram":
        engine.drafter = NgramDrafter(shortest=1)
    elif draft == "mtp":
        engine.draft_by_itself()
    elif draft is not None:
        engine.drafter = ModelDrafter(draft, engine.scheduler, 64)
    return engine


def requests(temperature, some=PROMPTS):
    return [
        Request(prompt, 12 + n, Sampling(temperature=temperature, top_p=0.9, seed=n))
        for n, prompt in enumerate(some)
    ]


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """A model, and one that guesses for it: its like with other values, which is often wrong."""
    return build(*KINDS[request.param]), build(*KINDS[request.param], *SMALLER, "seed=7")


def test_greedy_tokens_are_those_of_plain_decoding(pair):
    model, small = pair
    expected = decode(make(model), requests(0))
    for draft, tokens in itertools.product(("ngram", small, model), (1, 4)):
        engine = make(model, draft, tokens)
        assert decode(engine, requests(0)) == expected
        assert engine.scheduler.pool.used == 0
        if draft is model:  # whatever it guesses holds
            assert engine.counts.guessed == engine.counts.held
            assert engine.counts.guessed[0] > 0


def test_samples_with_looked_up_guesses_are_those_of_plain_decoding():
    model = build()
    expected = decode(make(model), requests(0.7))
    engine = make(model, "ngram")
    assert decode(engine, requests(0.7)) == expected
    assert 0 < engine.counts.held[0] < engine.counts.guessed[0]
    told = {
        (family.name, int(sample.labels["sequences"]), int(sample.labels["guesses"])): sample.value
        for family in text_string_to_metric_families(Metrics(engine).text().decode())
        for sample in family.samples
        if "sequences" in sample.labels
    }
    for row in engine.counts.measured.report()["rounds"]:
        for name in ("sigma", "target_efficiency") if row["guesses"] else ():
            key = f"pangu_{name}", row["sequences"], row["guesses"]
            assert told.pop(key, None) == (None if row[name] is None else pytest.approx(row[name]))
    assert told == {}


def test_preemption_small_passes_and_prefixes_change_nothing():
    model, small = build(), build(*SMALLER)
    expected = decode(make(model), requests(0))
    for draft in ("ngram", small):
        engine = make(model, draft, cache_tokens=68, max_batch_tokens=7, max_sequences=4)
        assert decode(engine, requests(0)) == expected
        assert engine.scheduler.preemptions > 0
        assert decode(engine, requests(0)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_layers_guess_and_the_text_stays_the_same(kind):
    model = build(*KINDS[kind], "model.mtp_num_layers=2")
    expected = decode(make(model), requests(0))
    engine = make(model, "mtp")
    assert decode(engine, requests(0)) == expected
    assert engine.counts.guessed[1] > 0
    engine = make(model, "mtp", cache_tokens=68, max_batch_tokens=7, max_sequences=4)
    assert decode(engine, requests(0)) == expected
    assert engine.scheduler.preemptions > 0
    decode(make(model, "mtp"), requests(0.8))


def guesses_of_whole_passes(model, tokens, depths):
    """Each layer's guess by megatron-core's own forward over all tokens."""
    found = []
    for depth in range(1, depths + 1):
        ids = torch.tensor([[*tokens, *found]])
        positions = torch.arange(ids.size(1))[None]
        angles = None
        if model.position_embedding_type == "rope" and not model.config.multi_latent_attention:
            angles = model.rotary_pos_emb(ids.size(1))
        with torch.no_grad():
            hidden = model.decoder(model.embedding(ids, positions), None, rotary_pos_emb=angles)
            states = model.mtp(
                ids, positions, hidden, None, rotary_pos_emb=angles, embedding=model.embedding
            )
            state = states.chunk(model.config.mtp_num_layers + 1)[depth]
            logits = model.row_logits(state, torch.tensor([len(tokens) - 2]))
        found.append(int(logits[0].argmax()))
    return found


def watched(engine):
    """The text and the guesses of every draft from now on."""
    propose, seen = engine.drafter.propose, []

    def watch(counts):
        found = propose(counts)
        seen.extend((list(s.tokens), list(draft.tokens)) for s, draft in found.items())
        return found

    engine.drafter.propose = watch
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_guess_what_they_do_in_a_pass_over_the_whole_text(kind):
    model = build(*KINDS[kind], "model.mtp_num_layers=3")
    engine = make(model, "mtp", max_batch_tokens=9)
    seen = watched(engine)
    decode(engine, requests(0))
    assert len(seen) > 20
    for tokens, guesses in seen[::5]:
        assert guesses == guesses_of_whole_passes(model, tokens, len(guesses))


def test_a_model_without_such_layers_says_so():
    with pytest.raises(ValueError, match="no layers of multi-token prediction"):
        make(build(), "mtp")


def test_a_stop_inside_guesses_that_hold_ends_the_text_there():
    model = build()
    (plain,) = decode(make(model), [Request(PROMPTS[0], 12, Sampling(temperature=0))])
    for last in range(1, 12):
        stop = frozenset({plain[last]})
        (found,) = decode(
            make(model, model), [Request(PROMPTS[0], 12, Sampling(temperature=0), stop)]
        )
        assert found == plain[: plain.index(plain[last])]
        request = Request(PROMPTS[0], last, Sampling(temperature=0))
        assert decode(make(model, model), [request]) == [plain[:last]]


def test_a_sampling_model_that_is_its_own_draft_is_always_right():
    model = build()
    engine = make(model, model)
    decode(engine, requests(0.8))
    assert engine.counts.held[3] / engine.counts.guessed[3] > 0.97  # rounding


def markov(vocab, seed):
    """A distribution of the next token for each last one, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(vocab, vocab, generator=generator, dtype=torch.float64) ** 3
    chances[torch.arange(vocab), torch.arange(1, vocab + 1) % vocab] = 0
    return chances / chances.sum(1, keepdim=True)


def outcomes(p, q, guesses, number, text):
    """Every text of `number` tokens behind `text` that rounds of speculation can give, with its
    probability, by the rule's own words: a guess holds with min(1, p/q), else the rest is drawn."""
    if number <= 0:
        yield (), 1.0
        return
    for drafted in itertools.product(range(len(p)), repeat=guesses):
        chance = 1.0
        for last, guess in zip((text, *drafted), drafted, strict=False):
            chance *= float(q[last, guess])
        if chance == 0:
            continue
        for found, holds in round_of(p, q, drafted, text):
            for rest, after in outcomes(p, q, guesses, number - len(found), found[-1]):
                yield (*found, *rest)[:number], chance * holds * after


def round_of(p, q, drafted, last):
    """What one round gives, and how probably, by trying every interval of the random numbers."""
    holds = 1.0
    for place, guess in enumerate(drafted):
        keep = min(1.0, float(p[last, guess] / q[last, guess]))
        rest = (p[last] - q[last]).clamp_min(0)
        if keep < 1:
            for token, chance in enumerate((rest / rest.sum()).tolist()):
                yield (*drafted[:place], token), holds * (1 - keep) * chance
        holds *= keep
        last = guess
    for token, chance in enumerate(p[last].tolist()):
        yield (*drafted, token), holds * chance


def test_every_text_of_a_toy_is_as_probable_as_without_speculation():
    """The rule itself, exactly: all drafts and all outcomes of two rounds enumerated."""
    p, q = markov(3, 1), markov(3, 2)
    q = 0.9 * q + 0.1 / 3
    found = {}
    for text, chance in outcomes(p, q, 2, 4, 0):
        found[text] = found.get(text, 0.0) + chance
    for text in itertools.product(range(3), repeat=4):
        expected = 1.0
        for last, token in zip((0, *text), text, strict=False):
            expected *= float(p[last, token])
        assert found.get(text, 0.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("drawn", [True, False])
def test_verification_draws_what_the_rule_says(drawn):
    """χ² of 12,000 rounds against the enumerated rule, or against plain drawing."""
    vocab, rounds = 4, 12_000
    p, q = markov(vocab, 3), markov(vocab, 4)
    q = 0.9 * q + 0.1 / vocab
    seen = {}
    for seed in range(rounds):
        draws = Draws(seed)
        draft, last = Draft(), 0
        for _ in range(2):
            guess = draws.token(q[last]) if drawn else int(q[last].argmax())
            draft.tokens.append(guess)
            if drawn:
                draft.chances.append(q[last])
            last = guess
        logits = p[[0, *draft.tokens]].log()
        found = tuple(verified(draft, logits, Sampling(), draws, [0]))
        # To the same length whatever held, drawn plainly from the model.
        while len(found) < 3:
            found = (*found, draws.token(p[found[-1]]))
        seen[found] = seen.get(found, 0) + 1
    expected = {
        text: float(p[0, text[0]] * p[text[0], text[1]] * p[text[1], text[2]])
        for text in itertools.product(range(vocab), repeat=3)
    }
    expected = {text: chance for text, chance in expected.items() if chance}
    assert seen.keys() <= expected.keys()
    assert p_value(seen, expected) > 0.01


def test_a_whole_engine_that_samples_with_a_draft_model_keeps_the_distribution():
    """χ² of the first three tokens of 10,000 requests against the whole forward's probabilities."""
    model, small = build(), build()
    generator = torch.Generator().manual_seed(1)
    for parameter in small.parameters():  # right often, not always
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.2 * noise * parameter.data.std()
    sampling = Sampling(top_k=3)
    expected = {(): 1.0}
    for _ in range(3):
        expected = {
            (*text, token): chance * float(chances[token])
            for text, chance in expected.items()
            for chances in [probabilities(whole_forward(model, [5, 17, 3, *text])[-1], sampling)]
            for token in chances.nonzero().flatten().tolist()
        }
    asked = [Request((5, 17, 3), 4, Sampling(top_k=3, seed=seed)) for seed in range(10_000)]
    settings = {"max_sequences": 500, "max_batch_tokens": 4000, "cache_tokens": 6000}
    engine = make(model, small, 2, **settings)
    seen = Counter(tuple(tokens[:3]) for tokens in decode(engine, asked))
    assert 0 < engine.counts.held[0] < engine.counts.guessed[0]
    assert seen.keys() <= expected.keys()
    assert p_value(seen, expected) > 0.01


def p_value(seen, chances):
    """Of a χ² test; outcomes that are expected fewer than five times are taken together."""
    total = sum(seen.values())
    rare = [text for text, chance in chances.items() if chance * total < 5]
    groups = [[text] for text in chances if text not in rare] + ([rare] if rare else [])
    expected = [total * sum(chances[text] for text in group) for group in groups]
    found = [sum(seen.get(text, 0) for text in group) for group in groups]
    statistic = sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True))
    half = torch.tensor([(len(groups) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_the_chi_square_is_the_tables():
    assert p_value({0: 60, 1: 40}, {0: 0.5, 1: 0.5}) == pytest.approx(0.0455, abs=1e-4)


def test_looked_up_tokens_are_those_that_followed_the_latest_longest_match():
    def guess(tokens, count=3, **sizes):
        sequence = Sequence(0, Request(tuple(tokens), 9))
        drafter = NgramDrafter(**sizes)
        return drafter.propose({sequence: count}).get(sequence, Draft()).tokens

    assert guess([1, 2, 3, 4, 9, 1, 2, 3]) == [4, 9, 1]
    assert guess([7, 1, 2, 5, 8, 1, 2, 6, 1, 2]) == [6, 1, 2]  # the later one
    assert guess([3, 1, 2, 5, 9, 1, 2, 6, 3, 1, 2]) == [5, 9, 1]  # the longer one
    assert guess([1, 2, 3, 4]) == []
    assert guess([4, 4, 4, 4]) == [4]  # what it could copy ends with the text
    assert guess([1]) == []


def test_the_look_up_follows_a_growing_text():
    sequence = Sequence(0, Request((1, 2, 3), 20))
    drafter = NgramDrafter()
    grown = NgramDrafter()
    generator = torch.Generator().manual_seed(0)
    for token in torch.randint(3, (60,), generator=generator).tolist():
        sequence.tokens.append(token)
        fresh = NgramDrafter().propose({sequence: 4})
        assert grown.propose({sequence: 4}) == fresh
        if token == 1:  # not asked every time
            assert drafter.propose({sequence: 4}) == fresh


def decoded(world_size):
    from megatron.core import parallel_state

    from configs.compose import load
    from pangu.engines.megatron import process_groups
    from pangu.model.build import build_model

    results = []
    for temperature in (0, 0.8):
        layout = ["parallel.expert_model_parallel_size=2"]
        config = load([*TINY, f"launch.processes={world_size}", *layout])
        process_groups.initialize(config)
        model = build_model(config)[0][0].eval()
        small = build_model(load([*TINY, *SMALLER, "seed=7", "launch.processes=2"]))[0][0].eval()
        results.append(
            [decode(make(model, draft), requests(temperature)) for draft in ("ngram", small)]
        )
        parallel_state.destroy_model_parallel()
    return results


@pytest.mark.distributed
def test_two_expert_parallel_processes_agree_and_decode_as_one_does():
    one, other = gloo.run(2, decoded, 2)
    assert one == other
    model = build()
    greedy = decode(make(model), requests(0))
    assert one[0] == [greedy, greedy]
    assert one[1][0] == decode(make(model), requests(0.8))
