"""One face for the tokenizers that corpora are written with.

Hugging Face `tokenizer.json`, SentencePiece `.model` and tiktoken rank files are wrapped, never
reimplemented. Text is always encoded as plain text: a document that spells out a special token
does not thereby end itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pangu.data import DataError
from pangu.data.checksums import SUMS_FILE, expected_digest

INFO_FILE = "tokenizer_info.json"
# Bytes that a BPE is trained on as one word: each merge goes through whole words.
_LONGEST_WORD = 1024
# Names under which published tokenizers keep the token that ends a document.
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "[EOS]", "[SEP]")


class Tokenizer(ABC):
    """Text to token ids and back.

    `vocab_size` counts every id, special ones included; `eod` is the id that ends a document.
    """

    kind: ClassVar[str]
    file: ClassVar[str]  # name of the file that `save` writes
    vocab_size: int
    eod: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """Write the tokenizer's own file as `folder / self.file`."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` reads back, and the hash that tells whether two
        corpora were written with the same tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        digest = hashlib.sha256((folder / self.file).read_bytes()).hexdigest()
        info = {"kind": self.kind, "file": self.file, "sha256": digest, "eod": self.eod}
        (folder / INFO_FILE).write_text(json.dumps({**info, "vocab_size": self.vocab_size}))

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What megatron-core's datasets write into their description."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "eod": self.eod}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library."""

    kind = "huggingface"
    file = "tokenizer.json"

    def __init__(self, path: Path, eod: str | int | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_file(str(path))
        self._backend.encode_special_tokens = True
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod = _find_eod(path, eod, vocabulary.get)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Texts that a chat template writes as one token each; `encode` never does."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        # a batch of one: only the batch has the variant without offsets, 1.5 times as fast
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def _write(self, folder: Path) -> None:
        self._backend.save(str(folder / self.file))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    kind = "sentencepiece"
    file = "tokenizer.model"

    def __init__(self, path: Path, eod: str | int | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        self._backend = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._backend.get_piece_size()
        if eod is None and self._backend.eos_id() >= 0:
            eod = self._backend.eos_id()
        pieces = {self._backend.id_to_piece(i): i for i in range(self.vocab_size)}
        self.eod = _find_eod(path, eod, pieces.get)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids))

    def _write(self, folder: Path) -> None:
        (folder / self.file).write_bytes(self._backend.serialized_model_proto())


_LONGEST_SPACE = 25_000  # characters, as Llama 3's own tokenizer has it
_SPACES = re.compile(rf"(?s:.*?\s{{{_LONGEST_SPACE}}}|.+)")


class TiktokenTokenizer(Tokenizer):
    """A tiktoken rank file (`base64 rank` per line) and, beside it, `<name>.json` holding what
    the rank file does not: `{"pat_str": …, "special_tokens": {name: id}}`."""

    kind = "tiktoken"
    file = "tokenizer.tiktoken"

    def __init__(self, path: Path, eod: str | int | None = None) -> None:
        import tiktoken

        self._ranks = {
            base64.b64decode(token): int(rank)
            for token, rank in (line.split() for line in path.read_bytes().splitlines() if line)
        }
        side = Path(f"{path}.json")
        if not side.is_file():
            raise DataError(
                f"{path} needs {side.name} beside it with its pat_str and special_tokens, "
                "which a tiktoken rank file does not hold"
            )
        self._rest = json.loads(side.read_text())
        self._backend = tiktoken.Encoding(
            path.stem,
            pat_str=self._rest["pat_str"],
            mergeable_ranks=self._ranks,
            special_tokens=self._rest["special_tokens"],
        )
        self.vocab_size = self._backend.n_vocab
        self.eod = _find_eod(path, eod, self._rest["special_tokens"].get)

    def encode(self, text: str) -> list[int]:
        # Its regular expressions run out of stack in a million spaces.
        parts = _SPACES.findall(text) if len(text) > _LONGEST_SPACE else [text]
        return [i for part in parts for i in self._backend.encode_ordinary(part)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids))

    def _write(self, folder: Path) -> None:
        lines = [
            f"{base64.b64encode(token).decode()} {rank}" for token, rank in self._ranks.items()
        ]
        (folder / self.file).write_text("\n".join(lines) + "\n")
        (folder / f"{self.file}.json").write_text(json.dumps(self._rest))


class NumberTokenizer(Tokenizer):
    """Writes ids as numbers: synthetic tokens have no text."""

    kind = "numbers"
    file = "tokenizer.numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod = 0

    def encode(self, text: str) -> list[int]:
        return [int(word) % self.vocab_size for word in text.split() if word.isdecimal()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def _write(self, folder: Path) -> None:
        (folder / self.file).write_text(str(self.vocab_size))


def _find_eod(path: Path, wanted: str | int | None, lookup: Callable[[str], int | None]) -> int:
    if isinstance(wanted, int):
        return wanted
    names = (wanted,) if wanted else _EOD_NAMES
    for name in names:
        found = lookup(name)
        if found is not None:
            return found
    if wanted:
        raise DataError(f"{path} has no token {wanted!r} to end a document with")
    raise DataError(f"{path} has none of the usual end-of-document tokens: name it with --eod")


_KINDS: dict[str, Callable[[Path, str | int | None], Tokenizer]] = {
    "huggingface": HuggingFaceTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "tiktoken": TiktokenTokenizer,
    "numbers": lambda path, eod: NumberTokenizer(int(path.read_text())),
}
_KIND_OF_SUFFIX = {".json": "huggingface", ".model": "sentencepiece", ".tiktoken": "tiktoken"}


def locate_tokenizer(path: str | Path) -> tuple[Path, str, int | None]:
    """The tokenizer's own file, its kind and, where it was saved in a folder, the end-of-document
    token. `path` as in `load_tokenizer`.

    Raises:
        DataError: when there is none.
    """
    file, kind, eod = Path(path), "", None
    if file.is_dir():
        if not (file / INFO_FILE).is_file():
            raise DataError(f"{file} holds no tokenizer ({INFO_FILE} is missing)")
        file, kind, eod = _saved(file)
    else:
        kind = _KIND_OF_SUFFIX.get(file.suffix, "")
    if not file.is_file():
        raise DataError(f"there is no tokenizer file {file}")
    if kind not in _KINDS:
        raise DataError(f"{file} is neither a tokenizer.json, a .model nor a .tiktoken file")
    return file, kind, eod


def _saved(folder: Path) -> tuple[Path, str, int]:
    """What `Tokenizer.save` wrote there, if it is still the same."""
    path = folder / INFO_FILE
    try:
        content = path.read_bytes()
        info = json.loads(content)
        # In the folder itself: it may come from a stranger.
        file, kind, eod = folder / Path(info["file"]).name, str(info["kind"]), info["eod"]
        if not isinstance(eod, int) or not 0 <= eod < info["vocab_size"]:
            raise ValueError(f"its end-of-document token is {eod!r}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error!r}") from error
    for part, digest, source in (
        (path, expected_digest(path), SUMS_FILE),
        (file, info.get("sha256"), INFO_FILE),
    ):
        if part.is_file() and digest and hashlib.sha256(part.read_bytes()).hexdigest() != digest:
            raise DataError(f"{part} is damaged: its content is not what {folder / source} says")
    return file, kind, eod


def load_tokenizer(path: str | Path, eod: str | None = None) -> Tokenizer:
    """The tokenizer in a file, or the one saved in a corpus folder.

    Args:
        path: `tokenizer.json`, a SentencePiece `.model`, a `.tiktoken` rank file, or a folder
            that `Tokenizer.save` wrote.
        eod: name of the token that ends a document, where the file does not say.

    Raises:
        DataError: when nothing there can be read as a tokenizer.
    """
    file, kind, saved = locate_tokenizer(path)
    try:
        return _KINDS[kind](file, saved if eod is None else eod)
    except DataError:
        raise
    except Exception as error:  # each library has its own exceptions, tokenizers a bare Exception
        reason = " ".join(str(error).split())
        raise DataError(f"{file} cannot be read as a {kind} tokenizer: {reason}") from error


class StreamDecoder:
    """Decodes a growing sequence of ids into pieces of text that join to the whole.

    A character whose bytes are spread over several tokens is held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        # The tail of the sequence: ids already shown, kept as context because SentencePiece
        # drops the space before a first piece, then ids not shown yet.
        self._shown: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Text that `token` completes; empty while a character is unfinished."""
        self._pending.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """What is left at the end, unfinished characters as U+FFFD."""
        text = self._new_text()
        self._advance()
        return text

    def _new_text(self) -> str:
        return self._decode(self._shown + self._pending)[len(self._decode(self._shown)) :]

    def _advance(self) -> None:
        self._shown, self._pending = self._pending or self._shown, []


def train_byte_level_bpe(
    texts: Iterator[str], vocab_size: int, folder: Path, eod: str | None = None
) -> Tokenizer:
    """Train a byte-level BPE on an iterator of texts and save it in `folder`.

    `eod` names the token that ends a document. Longer words than 1,024 bytes are learnt from in
    parts of that size.

    Raises:
        DataError: when `vocab_size` cannot hold all bytes and the end-of-document token, or text
            could be encoded to that token.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise DataError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and the end-of-document "
            "token need 257"
        )
    backend = Backend(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if eod and len(words.pre_tokenize_str(eod)) < 2:
        raise DataError(
            f"--eod {eod} is a word that a text may hold: give one such as {_EOD_NAMES[0]}"
        )
    parts = pre_tokenizers.FixedLength(_LONGEST_WORD)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, parts])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[eod or _EOD_NAMES[0]],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.pre_tokenizer = words
    path = folder / HuggingFaceTokenizer.file
    backend.save(str(path))
    tokenizer = HuggingFaceTokenizer(path, eod)
    tokenizer.save(folder)
    return tokenizer
