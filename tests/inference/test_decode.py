"""Cached decoding against the whole forward pass; sampling against probabilities by hand."""

import gloo
import pytest
import torch
import torch.distributed as dist

from configs.compose import load
from pangu.inference.sampling import Sampler, probabilities

TINY = [
    "backend=cpu",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.vocab_size=64",
    "model.num_experts=8",
    "model.moe_ffn_hidden_size=16",
    "model.shared_expert_ffn_hidden_size=16",
    "model.init_std=0.3",
    "train.seq_length=16",
]
MLA = [
    "model.attention=mla",
    "model.qk_layernorm=true",
    "model.q_lora_rank=24",
    "model.kv_lora_rank=16",
    "model.qk_head_dim=8",
    "model.qk_pos_emb_head_dim=4",
    "model.v_head_dim=6",
]
PROMPT = [5, 17, 3, 60, 22]


@pytest.fixture(scope="module", autouse=True)
def alone():
    gloo.single()
    gloo.parallel(tensor_model_parallel_size=1)


def build(*overrides):
    from pangu.model.build import build_model

    return build_model(load([*TINY, *overrides]))[0][0]


def decoded(layouts, world_size):
    """Logits of the prompt's next tokens, and a sample, in each layout (overrides)."""
    from megatron.core import parallel_state

    from pangu.engines.megatron import process_groups
    from pangu.inference.decode import Decoder, generate
    from pangu.model.build import build_model

    results = []
    for overrides in layouts:
        config = load([*TINY, f"launch.processes={world_size}", *overrides])
        process_groups.initialize(config)
        model = build_model(config)[0][0]
        decoder = Decoder(model, 7)
        logits = [decoder.feed(PROMPT), decoder.feed([9]), decoder.feed([41])]
        sampler = Sampler(top_p=0.9, seed=dist.get_rank())  # rank 0 draws for all
        sample = list(generate(model, PROMPT, sampler, max_new_tokens=8, vocab_size=64))
        results.append((torch.stack(logits), sample))
        parallel_state.destroy_model_parallel()
    return results


@pytest.mark.distributed
def test_expert_and_tensor_parallel_models_generate_what_one_process_does():
    layouts = [
        ["parallel.expert_model_parallel_size=2"],
        ["parallel.tensor_model_parallel_size=2"],  # with sequence parallelism
    ]
    (expected, sample), *_ = gloo.run(1, decoded, [[]], 1)[0]
    for rank in gloo.run(2, decoded, layouts, 2):
        for logits, tokens in rank:
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            assert tokens == sample


def whole_forward(model, tokens):
    """Logits `[seq, vocab]` without any cache."""
    model.eval()
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return model(ids, torch.arange(len(tokens))[None], None)[0]


@pytest.mark.parametrize("overrides", [[], MLA, ["model.position_embedding=learned"]])
def test_cached_logits_are_those_of_the_whole_forward_pass(overrides):
    from pangu.inference.decode import Decoder

    model = build(*overrides)
    tokens = [*PROMPT, 9, 41, 8]
    expected = whole_forward(model, tokens)
    decoder = Decoder(model, len(tokens))
    cached = [decoder.feed(PROMPT), *(decoder.feed([token]) for token in tokens[5:])]
    assert expected.std() > 0.1  # a model that says something
    torch.testing.assert_close(torch.stack(cached), expected[4:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="9 tokens do not fit into 8"):
        decoder.feed([1])


@pytest.mark.parametrize("overrides", [[], ["model.mtp_num_layers=1"]])
def test_greedy_decoding_takes_the_argmax_of_the_whole_forward_pass(overrides):
    from pangu.inference.decode import generate

    model = build(*overrides)
    model.train()
    greedy = Sampler(temperature=0)
    found = list(generate(model, PROMPT, greedy, max_new_tokens=6, vocab_size=64))
    assert model.training  # and as it was before
    assert (model.config.mtp_num_layers is not None) == bool(overrides)
    model.config.mtp_num_layers, model.mtp_process = None, False
    tokens = list(PROMPT)
    for _ in range(6):
        tokens.append(int(whole_forward(model, tokens)[-1].argmax()))
    assert found == tokens[5:]
    stopped = list(generate(model, PROMPT, greedy, max_new_tokens=6, vocab_size=64, eod=found[2]))
    assert stopped == found[: found.index(found[2])]


def test_tokens_beyond_the_tokenizers_vocabulary_are_never_drawn():
    from pangu.inference.decode import generate

    found = generate(build(), PROMPT, Sampler(seed=1), max_new_tokens=10, vocab_size=3)
    assert set(found) <= {0, 1, 2}


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()

    def kept(top_p):
        return probabilities(logits, 1.0, top_p).tolist()

    assert kept(1.0) == pytest.approx([0.15, 0.5, 0.05, 0.3])
    assert kept(0.9) == pytest.approx([0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95])
    assert kept(0.79) == pytest.approx([0, 0.625, 0, 0.375])
    assert kept(0.5 - 1e-6) == [0, 1, 0, 0]
    assert kept(0.0) == [0, 1, 0, 0]


def test_temperature_sharpens_and_zero_is_greedy():
    logits = torch.tensor([0.2, 0.8]).log()
    assert probabilities(logits, 0.5).tolist() == pytest.approx([1 / 17, 16 / 17])
    assert probabilities(logits, 0).tolist() == [0, 1]


def test_draws_follow_the_distribution_and_the_seed():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()

    def draw(seed):
        sampler = Sampler(top_p=0.79, seed=seed)
        return [sampler(logits) for _ in range(2000)]

    first = draw(seed=3)
    assert first == draw(seed=3) != draw(seed=4)
    assert set(first) == {1, 3}
    assert first.count(1) / 2000 == pytest.approx(0.625, abs=0.04)  # four standard deviations
