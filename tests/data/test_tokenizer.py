"""Every kind of tokenizer, each trained or made on the spot, through the one interface."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from pangu.data import DataError
from pangu.data.tokenizer import (
    StreamDecoder,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
    train_byte_level_bpe,
)

TEXTS = [
    "the expert of a group takes the token, the group of an expert takes the load",
    "def route(tokens):\n    return tokens @ weight  # größe, naïve, 专家 🚀\n",
    "  two  spaces, a\ttab and \r\n a line",
] * 30


def make_sentencepiece(folder: Path) -> Path:
    path = folder / "sp.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=330,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            minloglevel=2,
        )
    return path


def make_tiktoken(folder: Path) -> Path:
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" t", b" the", b"ro", b"rou"]
    path = folder / "small.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    rest = {
        "pat_str": r" ?\w+|\s+(?!\S)|\s+|[^\s\w]+",
        "special_tokens": {"<|endoftext|>": len(tokens)},
    }
    Path(f"{path}.json").write_text(json.dumps(rest))
    return path


@pytest.fixture(scope="module", params=["huggingface", "sentencepiece", "tiktoken"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "huggingface":
        return train_byte_level_bpe(iter(TEXTS), 320, folder)
    make = {"sentencepiece": make_sentencepiece, "tiktoken": make_tiktoken}[request.param]
    return load_tokenizer(make(folder))


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in [*TEXTS[:3], "unseen: ∂Ω/∂t = ∇×𝔉 \u200b", "x" * 1000]:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eod not in ids
        assert tokenizer.decode(ids) == text


def test_a_special_token_spelled_out_is_text(tokenizer: Tokenizer) -> None:
    for name in ("<|endoftext|>", "</s>"):
        ids = tokenizer.encode(f"a {name} b")
        assert tokenizer.eod not in ids
        assert tokenizer.decode(ids) == f"a {name} b"


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.kind, again.eod, again.vocab_size) == (
        tokenizer.kind,
        tokenizer.eod,
        tokenizer.vocab_size,
    )
    assert [again.encode(text) for text in TEXTS[:3]] == [
        tokenizer.encode(text) for text in TEXTS[:3]
    ]


def test_streaming_shows_whole_characters_only(tokenizer: Tokenizer) -> None:
    text = "naïve 专家 🚀🚀 route the token"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text  # nothing left for flush
    assert not any("\ufffd" in piece for piece in pieces)
    assert decoder.flush() == ""
    assert len([piece for piece in pieces if piece]) > 5  # it streams


def test_streaming_any_ids_joins_to_the_whole(tokenizer: Tokenizer) -> None:
    """A model may well generate bytes that are no UTF-8."""
    draw = random.Random(0)
    special = {tokenizer.eod, 0, 1, 2} if tokenizer.kind == "sentencepiece" else {tokenizer.eod}
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in special]
    for _ in range(50):
        ids = draw.choices(ordinary, k=30)
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_end_of_document_by_name(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "STOP": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    backend.save(str(path))
    with pytest.raises(DataError, match="name it with --eod"):
        load_tokenizer(path)
    with pytest.raises(DataError, match="has no token 'END'"):
        load_tokenizer(path, "END")
    tokenizer = load_tokenizer(path, "STOP")
    assert tokenizer.eod == 2
    assert tokenizer.encode("b a c") == [1, 0, 3]
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).eod == 2


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no tokenizer file"):
        load_tokenizer(tmp_path / "absent.json")
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    for name in ("broken.json", "broken.model", "broken.tiktoken"):
        (tmp_path / name).write_text("{nonsense")
        with pytest.raises(DataError, match=name):
            load_tokenizer(tmp_path / name)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"neither a tokenizer\.json"):
        load_tokenizer(tmp_path / "vocab.txt")
    ranks = make_tiktoken(tmp_path)
    Path(f"{ranks}.json").unlink()
    with pytest.raises(DataError, match=r"needs small\.tiktoken\.json beside it"):
        load_tokenizer(ranks)


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="256 bytes and the end-of-document token need 257"):
        train_byte_level_bpe(iter(TEXTS), 256, tmp_path)


def test_one_unbroken_word_is_learnt_from_in_parts(tmp_path: Path) -> None:
    """Each merge goes through whole words: 300 KB in one took 33 s. Counted, not timed: no token
    is longer than a part's 1,024 bytes, where 2 ** 18 would be."""
    tokenizer = train_byte_level_bpe(iter(["a" * 1024 * 300]), 300, tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert [len(token) for token in sorted(backend.get_vocab()) if set(token) == {"a"}] == [
        2**power for power in range(11)
    ]
    assert tokenizer.decode(tokenizer.encode("a" * 5000)) == "a" * 5000


def test_words_of_texts_are_learnt_whole(tmp_path: Path) -> None:
    """As without the bound: the merges of an unbounded trainer, on real text."""
    text = Path(random.__file__).read_text() + "=" * 1000
    train_byte_level_bpe(iter([text]), 700, tmp_path)
    unbounded = Backend(models.BPE())
    unbounded.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    unbounded.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    assert written["model"] == json.loads(unbounded.to_str())["model"]
    assert written["pre_tokenizer"] == json.loads(unbounded.to_str())["pre_tokenizer"]


def test_a_million_spaces(tokenizer: Tokenizer) -> None:
    """tiktoken's regular expression, as OpenAI's models have it, ran out of stack there."""
    text = "a" + " " * 1_200_000 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    short = "a" + " " * 24_999 + "b"
    if isinstance(tokenizer, TiktokenTokenizer):
        assert tokenizer.encode(short) == tokenizer._backend.encode_ordinary(short)
