"""Decoding whose sums have one order: bits of logits, alone and among others, on kernels in
Triton's interpreter; what is said where nothing has to change or nothing can be done."""

from dataclasses import replace

import in_interpreter  # noqa: F401  (first)
import numpy as np
import pytest
import torch
from tiny_models import MLA, build, prompts

from pangu import backends
from pangu.data.tokenizer import NumberTokenizer  # noqa: F401  (before megatron-core)
from pangu.generate import main
from pangu.inference import batch_invariant
from pangu.inference.batching import Request
from pangu.inference.sampling import Sampling
from pangu.ops.matmul import products_in_one_order

TOP_K = ["moe.num_expert_groups=1", "moe.top_k=2", "model.num_layers=1"]
FIXED = {"attention": "fixed", "grouped_matmul": "fixed", "linear": "torch"}


@pytest.fixture
def in_one_order(monkeypatch):
    """The operators of a GPU, on this CPU; and a multiplication that treats a tile's rows alike, as
    matrix units do."""

    def matmul(a, b, dtype):
        return (a.astype(dtype)[:, :, None] * b.astype(dtype)[None]).sum(axis=1)

    build()  # chooses the backend
    monkeypatch.setattr(np, "matmul", matmul)
    here = backends.current()
    operators = replace(here.operators, **FIXED)
    monkeypatch.setattr(backends, "_current", replace(here, operators=operators))
    library = products_in_one_order(here.device)
    yield
    library._destroy()


def logits_of(model, asked, count, **settings):
    """Rows of logits of the first request, and its tokens."""
    from pangu.inference.engine import Engine
    from pangu.inference.speculative import NgramDrafter

    guesses = settings.pop("guesses", 0)
    engine = Engine(model, vocab_size=64, cache_tokens=512, page_size=4, **settings)
    if guesses:
        engine.drafter, engine.draft_tokens = NgramDrafter(shortest=1), guesses
    rows, tokens, inside = [], [], engine._updated

    def kept(sequence, drawn, logits):
        if sequence.number == 0:
            rows.extend(logits[: len(drawn)].clone())
        return inside(sequence, drawn, logits)

    engine._updated = kept
    for request in asked:
        engine.add(Request(request, count, Sampling(temperature=0)))
    while engine.busy:
        for update in engine.step():
            tokens += update.tokens if update.number == 0 else []
        if len(tokens) == count:
            break
    return torch.stack(rows), tokens, engine.counts


@pytest.mark.parametrize("kind", [TOP_K, [*MLA, *TOP_K]], ids=("gqa", "mla"))
def test_the_bits_of_logits_do_not_depend_on_the_others(kind, in_one_order):
    model = build(*kind)
    first, *others = prompts(3, shortest=9, longest=20)
    alone, tokens, _ = logits_of(model, [first], 3)
    among, same, _ = logits_of(model, [first, *others], 3)
    assert torch.equal(alone, among)
    assert tokens == same
    with torch.no_grad():
        ids = torch.tensor([[*first, *tokens]])
        whole = model(ids, torch.arange(ids.size(1))[None], None)[0]
    torch.testing.assert_close(alone, whole[len(first) - 1 : -1], rtol=2e-5, atol=2e-5)


def test_nor_on_chunks_or_guesses(in_one_order):
    model = build(*TOP_K)
    text = (3, 5, 9, 3, 5, 9, 3, 5, 9, 3, 5)
    alone, tokens, _ = logits_of(model, [text], 6)
    for settings in ({"max_batch_tokens": 4, "max_sequences": 2}, {"guesses": 3}):
        rows, same, counts = logits_of(model, [text, text[:5]], 6, **settings)
        assert torch.equal(alone, rows)
        assert tokens == same
    assert sum(counts.guessed.values()) > 0


def test_kernels_are_tried_before_they_are_used(in_one_order, monkeypatch):
    monkeypatch.setattr(batch_invariant, "TOLERANCES", {torch.float32: 1e-5})
    assert batch_invariant._fault(torch.device("cpu")) == ""
    right = batch_invariant.Fixed.rows
    for wrong, said in (
        (lambda x, w, counts: right(x, w, counts) * 1.001, "results in torch.float32 are wrong"),
        (lambda x, w, counts: right(x, w, counts) + 1e-6 / len(x), "a row depends on others"),
        (lambda x, w, counts: 1 / 0, "division by zero"),
    ):
        monkeypatch.setattr(batch_invariant.Fixed, "rows", wrong)
        assert batch_invariant._fault(torch.device("cpu")) == said


def test_a_cpu_says_that_it_is_so_already_and_others_refuse(monkeypatch):
    build()
    here = backends.current()
    said = batch_invariant.decode_in_one_order()
    assert "on this device, tokens never depend on neighbours with float32" in said
    assert backends.current() is here
    monkeypatch.setattr(backends, "_current", replace(here, in_one_order=None))
    with pytest.raises(ValueError, match="no kernels for it: they are for NVIDIA GPUs"):
        batch_invariant.decode_in_one_order()


def test_tensor_parallel_ranks_sum_in_no_order_of_theirs(capsys):
    from pangu import serve

    words = ["checkpoint=x", "batch_invariant=true", "parallel.tensor_model_parallel_size=2"]
    assert serve.main(words) == 2
    assert "batch_invariant=True: sums over tensor-parallel ranks" in capsys.readouterr().err
    assert main(["checkpoint=x", "batch_invariant=maybe"]) == 2
    assert "batch_invariant=maybe" in capsys.readouterr().err
