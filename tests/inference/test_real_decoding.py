"""A real pretrained model decodes what transformers' generate does, token for token."""

from pathlib import Path

import gloo
import pytest
import torch
from real_models import smollm2
from tiny_models import decode

from pangu.inference.batching import Request
from pangu.inference.sampling import Sampling

TEXTS = [
    "The first president of the United States was",
    "def fibonacci(n):\n",
    "Water boils at",
    "The first president of the United States was born in",
]
COUNT = 24


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    from pangu.weights.convert import import_model

    folder = tmp_path_factory.mktemp("smollm2") / "ours"
    import_model(smollm2(), folder)
    return folder


def test_greedy_batches_of_real_text_are_those_of_transformers(ours, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pangu.inference.engine import Engine
    from pangu.trained_model import load_for_inference, read_run_config
    from pangu.weights.convert import export_model

    gloo.single()
    export_model(ours, tmp_path / "theirs")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    encode = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    expected, asked = [], []
    for text in TEXTS:
        ids = encode(text, return_tensors="pt").input_ids
        with torch.no_grad():
            found = theirs.generate(
                ids, do_sample=False, max_new_tokens=COUNT, eos_token_id=None, use_cache=True
            )
        expected.append(found[0, ids.size(1) :].tolist())
        asked.append(Request(tuple(ids[0].tolist()), COUNT, Sampling(temperature=0)))
    del theirs
    model, tokenizer = load_for_inference(read_run_config(ours), ours)
    engine = Engine(model, vocab_size=tokenizer.vocab_size, cache_tokens=160, max_batch_tokens=13)
    assert decode(engine, asked) == expected
    assert decode(engine, asked) == expected  # from prefixes in the cache
