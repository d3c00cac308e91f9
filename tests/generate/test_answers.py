"""Prompts from files, and files of answers that are gone on with."""

import json

import pytest

from pangu import generate
from pangu.data.sources import JsonLines
from pangu.generate import Options, main
from pangu.inference.answers import AnswersError, answer, read_prompts, take_up

PROMPTS = ["eins", "zwei\ndrei", "vier"]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Options whose model answers a prompt with its place; what it was asked for last."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    begun = []

    def stream(options, done=0):
        begun.append(done)
        for place, prompt in enumerate(PROMPTS[done:], done):
            yield answer(prompt, f" {place}", "length")

    monkeypatch.setattr(generate, "stream", stream)
    output = str(tmp_path / "answers.jsonl")
    return Options(checkpoint="x", prompts=str(file), output=output), begun


def test_a_file_of_answers_is_gone_on_with_behind_its_last_whole_line(asked, tmp_path):
    options, begun = asked
    file = tmp_path / "answers.jsonl"
    generate.write(options)
    whole = file.read_bytes()
    assert [json.loads(line)["text"] for line in whole.splitlines()] == [" 0", " 1", " 2"]
    assert json.loads(whole.splitlines()[1])["document"] == "zwei\ndrei 1"
    first = whole.index(b"\n") + 1
    for kept, from_ in ((first + 7, 1), (first, 1), (first - 1, 0), (0, 0)):
        file.write_bytes(whole[:kept])
        generate.write(options)
        assert file.read_bytes() == whole
        assert begun[-1] == from_
    count = len(begun)
    generate.write(options)  # all there: no model is loaded
    assert (file.read_bytes(), len(begun)) == (whole, count)


def test_answers_are_documents_of_a_corpus(asked, tmp_path):
    generate.write(asked[0])
    lines = tuple((tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True))
    piece = JsonLines(tmp_path / "answers.jsonl", 1, lines, "document", 1)
    assert [each.text for each in piece.read()] == ["eins 0", "zwei\ndrei 1", "vier 2"]


def test_answers_to_other_prompts_are_left_alone(tmp_path):
    file = tmp_path / "answers.jsonl"
    for content in (answer("zwei", "", "stop"), answer("eins", "", "stop") * 2, "{}\n", "x\n"):
        file.write_text(content)
        with pytest.raises(AnswersError, match="answers no such prompt: name another file"):
            take_up(file, ["eins"])
        assert file.read_text() == content


def test_prompts_have_lines_or_are_lines(tmp_path):
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("eins\n\nzwei")
    assert read_prompts(plain) == ["eins", "", "zwei"]
    rows.write_text('{"prompt": "a\\nb", "text": "c"}\n')
    assert read_prompts(rows) == ["a\nb"]
    for wrong in ('{"text": "a"}', "[1]", "a", '{"prompt": 1}'):
        rows.write_text(f'{{"prompt": "a"}}\n{wrong}\n')
        with pytest.raises(AnswersError, match="line 2 is no JSON object with a text under"):
            read_prompts(rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["output=y"], "output=y: takes answers to prompts=FILE"),
        (["prompt=a", "output=y"], "output=y: takes answers to prompts=FILE"),
        (["prompts={prompts}", "output={folder}"], "cannot be used: [Errno 21] Is a directory"),
    ],
)
def test_a_wrong_output_is_a_sentence(arguments, sentence, tmp_path, capsys):
    (tmp_path / "p").write_text("eins\n")
    places = {"prompts": tmp_path / "p", "folder": tmp_path}
    assert main(["checkpoint=x", *(each.format(**places) for each in arguments)]) == 2
    assert sentence in capsys.readouterr().err
