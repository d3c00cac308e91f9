"""Small real corpora, prepared once per session."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pangu.data.corpus import Preparation, prepare

WORDS = [
    "route",
    "expert",
    "group",
    "token",
    "layer",
    "load",
    "naïve",
    "größe",
    "专家",
    "🚀",
    "rank",
]


def write_texts(folder: Path, count: int, seed: int, words: list[str] = WORDS) -> Path:
    """`count` files of some hundred words each."""
    draw = random.Random(seed)
    for number in range(count):
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(draw.choices(words, k=draw.randint(50, 400))))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 documents with a fifth held out and a byte-level BPE of 300 tokens."""
    root = tmp_path_factory.mktemp("corpus")
    texts = write_texts(root / "texts", 60, seed=1)
    prepare(Preparation([texts], root / "words", train_tokenizer=300, held_out=0.2, workers=2))
    return root / "words"


@pytest.fixture(scope="session")
def second_corpus(corpus: Path) -> Path:
    """Other documents, written with the tokenizer of the first corpus."""
    root = corpus.parent
    texts = write_texts(root / "numbers-texts", 20, seed=2, words=["1", "22", "333", "4444"])
    prepare(Preparation([texts], root / "numbers", tokenizer=corpus, held_out=0.2))
    return root / "numbers"


@pytest.fixture(scope="session")
def foreign_corpus(corpus: Path) -> Path:
    """A corpus with a tokenizer of its own."""
    output = corpus.parent / "foreign"
    prepare(Preparation([corpus.parent / "texts"], output, train_tokenizer=280, held_out=0.2))
    return output
