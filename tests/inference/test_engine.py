"""Continuous batching over pages against whole forward passes, one sequence at a time."""

import gloo
import pytest
import torch
import torch.distributed as dist
from tiny_models import KINDS, MLA, TINY, build, decode, greedy, prompts, whole_forward

from configs.compose import load
from pangu.data.tokenizer import NumberTokenizer
from pangu.inference.batching import Request
from pangu.inference.sampling import Sampling
from simulator.hardware import load_hardware
from simulator.inference import memory_bytes
from simulator.serving import serving

GREEDY = Sampling(temperature=0)
PROMPTS = prompts(6)


def make(model, **settings):
    from pangu.inference.engine import Engine

    return Engine(model, vocab_size=64, cache_tokens=512, page_size=4, **settings)


def requests(count=12, temperature=0.0, some=PROMPTS):
    return [
        Request(prompt, count + n, Sampling(temperature=temperature, top_p=0.9, seed=n))
        for n, prompt in enumerate(some)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_takes_the_argmax_of_each_sequences_whole_forward_pass(kind):
    model = build(*KINDS[kind])
    engine = make(model, max_batch_tokens=16, max_sequences=4)
    asked = requests(10)
    expected = [greedy(model, request.prompt, request.max_new_tokens) for request in asked]
    assert whole_forward(model, list(PROMPTS[0])).std() > 0.1  # a model that says something
    assert decode(engine, asked) == expected
    assert engine.scheduler.pool.used == 0


FULL = 4 * (12 + 6)  # keys and values of four heads
ADAPTED = ["model.lora_rank=2", "model.lora_modules=[linear_kv_up_proj]"]


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ([], 2 * (8 + 8)),
        (MLA, 16 + 4),  # latents and the rotated part of the key, one for all heads
        ([*MLA, "model.kv_bits=4"], FULL),
        ([*MLA, "model.activation_bits=8"], FULL),
        ([*MLA, *ADAPTED], FULL),
        ([*MLA, "model.lora_rank=2", "model.lora_modules=[linear_proj]"], 16 + 4),
    ],
)
def test_the_cache_has_the_bytes_of_a_token_that_the_simulator_counts(options, numbers):
    engine = make(build(*options))
    decode(engine, requests(2, some=PROMPTS[:2]))
    found = engine.store.bytes_per_token
    assert found == 2 * 4 * numbers  # layers, bytes
    assert found == 2 * counted(options)  # which plans for 16 bits


def counted(options):
    """Bytes of a token in the cache of one device, by the simulator."""

    def bytes_of(length):
        plan = ["hardware=h100", f"inference.max_new_tokens={length}"]
        config = load([*TINY, "devices=1", "inference.kv_dtype=bf16", *plan, *options])
        return float(memory_bytes(serving(config, load_hardware(config.hardware)), 1))

    return bytes_of(101) - bytes_of(100)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def alone(model):
    """What each request draws in an engine of its own."""
    return [decode(make(model), [request])[0] for request in requests(temperature=1.0)]


@pytest.mark.parametrize("max_batch_tokens", [6, 17, 512])
def test_samples_depend_on_neither_neighbours_nor_chunks(model, alone, max_batch_tokens):
    engine = make(model, max_batch_tokens=max_batch_tokens, max_sequences=6)
    assert decode(engine, requests(temperature=1.0)) == alone


def test_samples_do_not_depend_on_the_place_in_the_batch(model, alone):
    assert decode(make(model), requests(temperature=1.0)[::-1])[::-1] == alone


def test_a_sequence_that_lost_its_pages_goes_on_as_if_nothing_had_happened(model, alone):
    from pangu.inference.engine import Engine

    for reuse in (False, True):
        engine = Engine(model, vocab_size=64, cache_tokens=100, page_size=4, prefix_reuse=reuse)
        assert decode(engine, requests(temperature=1.0)) == alone
        assert engine.scheduler.preemptions > 0
        assert engine.scheduler.pool.used == 0


def test_a_prompt_that_begins_as_another_did_is_computed_from_there_on(model):
    common = prompts(1, seed=5, shortest=30, longest=30)[0]
    asked = [Request((*common, n), 8, Sampling(seed=n)) for n in range(4)]
    expected = [decode(make(model, prefix_reuse=False), [request])[0] for request in asked]
    engine = make(model)
    assert [decode(engine, [request])[0] for request in asked] == expected
    number = engine.add(asked[0])
    assert engine.step()[0].reused == 28  # whole pages of four of the 31, but not the last
    engine.cancel(number)
    engine.scheduler.pool.forget()
    engine.add(asked[0])
    assert engine.step()[0].reused == 0


def test_prefixes_in_use_by_several_at_once_stay_until_the_last_has_ended(model):
    common = prompts(1, seed=6, shortest=24, longest=24)[0]
    asked = [Request((*common, n), 5 + 3 * n, Sampling(seed=n)) for n in range(5)]
    expected = [decode(make(model, prefix_reuse=False), [request])[0] for request in asked]
    engine = make(model)
    decode(engine, asked[:1])
    assert decode(engine, asked) == expected
    assert engine.scheduler.pool.used == 0


def test_weights_that_have_changed_are_forgotten_with_all_that_was_made_of_them():
    model, (prompt,) = build(), prompts(1, seed=4, shortest=12, longest=12)
    engine, request = make(model), Request(prompt, 40, GREEDY)
    before = decode(engine, [request])
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.flip(0))
    engine.forget()
    after = decode(engine, [request])
    assert after == [greedy(model, prompt, 40)] != before


def test_a_cancelled_request_leaves_no_trace(model, alone):
    engine = make(model, max_batch_tokens=16)
    numbers = [engine.add(request) for request in requests(temperature=1.0)]
    found = {number: [] for number in numbers}
    steps = 0
    while engine.busy:
        for update in engine.step():
            found[update.number] += update.tokens
        steps += 1
        if steps in (1, 4, 9):
            engine.cancel(numbers[steps % 3])
    assert [found[n] for n in numbers[3:]] == alone[3:]
    assert engine.scheduler.pool.used == 0


def test_the_logprobs_of_a_token_are_the_models(model):
    engine = make(model)
    engine.add(Request(PROMPTS[0], 6, Sampling(temperature=1.5, seed=3), logprobs=3))
    tokens, report = list(PROMPTS[0]), []
    while engine.busy:
        for update in engine.step():
            tokens += update.tokens
            report += update.logprobs
    rows = whole_forward(model, tokens).log_softmax(1)[len(PROMPTS[0]) - 1 : -1]
    for row, likely in zip(rows, report, strict=True):
        assert likely.logprob == pytest.approx(float(row[likely.token]), abs=1e-5)
        assert [token for token, _ in likely.top] == row.topk(3).indices.tolist()
    assert [likely.token for likely in report] == tokens[len(PROMPTS[0]) :]


def test_ends_are_a_stop_token_a_text_and_the_length(model):
    prompt = PROMPTS[1]
    tokens = greedy(model, prompt, 8)
    tokenizer = NumberTokenizer(64)
    third = tokens[2]
    first = tokens.index(third)
    before = tokenizer.decode(tokens[:first])

    def ended(**ends):
        engine = make(model, tokenizer=tokenizer)
        engine.add(Request(prompt, 8, GREEDY, **ends))
        text, finish = "", ""
        while engine.busy:
            for update in engine.step():
                text += update.text
                finish = update.finish
        return text, finish

    assert ended() == (tokenizer.decode(tokens), "length")
    assert ended(stop_tokens=frozenset({third})) == (before, "stop")
    text, finish = ended(stop=(f" {tokens[3]} {tokens[4]}", "never"))
    assert finish == "stop"
    assert text == tokenizer.decode(tokens).split(f" {tokens[3]} {tokens[4]}")[0]


def test_tokens_beyond_the_tokenizers_vocabulary_are_never_drawn(model):
    from pangu.inference.engine import Engine

    engine = Engine(model, vocab_size=3, cache_tokens=64)
    (found,) = decode(engine, [Request(PROMPTS[1], 10, Sampling(seed=1))])
    assert set(found) <= {0, 1, 2}


def test_predictions_that_are_no_numbers_end_their_own_request_alone():
    model = build("model.tie_embeddings=false")
    with torch.no_grad():
        model.embedding.word_embeddings.weight[60] = torch.nan
    engine = make(model)
    engine.add(Request((5, 60), 4, GREEDY))
    engine.add(Request((5, 6), 1, GREEDY))
    finishes = {}
    while engine.busy:
        finishes |= {update.number: update.finish for update in engine.step()}
    assert finishes == {0: "not finite", 1: "length"}


def test_a_request_that_can_never_fit_is_refused(model):
    engine = make(model)
    with pytest.raises(ValueError, match="520 tokens do not fit into a cache of 512"):
        engine.add(Request((1,) * 500, 20))
    with pytest.raises(ValueError, match="one token at least"):
        engine.add(Request((), 20))


def test_a_model_in_training_is_left_as_it_was():
    from pangu.inference.engine import generate

    model = build("model.mtp_num_layers=1").train()
    request = Request(PROMPTS[0], 6, GREEDY)
    found = list(generate(model, request, 64))
    assert model.training
    assert model.mtp_process
    model.config.mtp_num_layers, model.mtp_process = None, False
    assert found == greedy(model.eval(), PROMPTS[0], 6)


def decoded(layouts, world_size):
    """What requests draw in each layout (overrides), and the bytes that the cache has a token."""
    from megatron.core import parallel_state

    from pangu.engines.megatron import process_groups
    from pangu.model.build import build_model

    results = []
    for overrides in layouts:
        config = load([*TINY, f"launch.processes={world_size}", *overrides])
        process_groups.initialize(config)
        model = build_model(config)[0][0].eval()
        asked = requests(8, temperature=1.0)
        if dist.get_rank():  # rank 0 draws for all
            asked = [Request(r.prompt, r.max_new_tokens, Sampling(seed=99)) for r in asked]
        engine = make(model, max_batch_tokens=9)
        results.append((decode(engine, asked), engine.store.bytes_per_token))
        parallel_state.destroy_model_parallel()
    return results


@pytest.mark.distributed
def test_expert_and_tensor_parallel_models_generate_what_one_process_does(model):
    expected = decode(make(model), requests(8, temperature=1.0))
    layouts = [
        ["parallel.expert_model_parallel_size=2"],
        ["parallel.tensor_model_parallel_size=2"],  # with sequence parallelism
        ["parallel.tensor_model_parallel_size=2", *MLA],
    ]
    for *same, (_, whole) in gloo.run(2, decoded, layouts, 2):
        assert [tokens for tokens, _ in same] == [expected, expected]
        assert whole == 2 * 4 * FULL / 2 == 2 * counted(["devices=2", *layouts[-1]])
