"""Where documents come from: text folders, JSON lines and Parquet, cut into pieces.

A piece is about a megabyte, or a Parquet row group. It is small to send to another process, which
does the reading, parsing and tokenising.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pangu.data import DataError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

PIECE_BYTES = 1 << 20
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}


class NoText(Enum):
    """Why a file is no document."""

    BINARY = "binary"  # it holds a null byte
    ENCODING = "not UTF-8"


@dataclass(frozen=True)
class Document:
    """A document, and where it stands. The key decides which side of the split it is on."""

    key: str
    text: str | NoText
    where: str  # file, and line or row


class Piece(Protocol):
    """Some documents, and how many bytes of the input they make up."""

    @property
    def size(self) -> int: ...

    @property
    def where(self) -> str:
        """The file, or the first of the files, that it is of."""
        ...

    def read(self) -> Iterator[Document]:
        """Its documents.

        Raises:
            DataError: naming file and line or row, for what cannot be read.
        """
        ...


@dataclass(frozen=True)
class SourceFile:
    """An input file; `name` is its path inside the folder that was given."""

    path: Path
    name: str
    size: int

    @property
    def kind(self) -> str:
        """`jsonl`, `parquet` or `text`."""
        # C4 and its kin call compressed JSON lines .json.gz
        if self.path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
            return "jsonl"
        return "parquet" if self.path.suffix == ".parquet" else "text"


@dataclass(frozen=True)
class TextFiles:
    """Files that are one document each; keyed by their path, so that an edited file stays on its
    side of the split."""

    files: tuple[SourceFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def where(self) -> str:
        return str(self.files[0].path)

    def read(self) -> Iterator[Document]:
        for file in self.files:
            yield Document(file.name, _text(_content(file.path)), str(file.path))


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end: {error}") from error


def _text(content: bytes) -> str | NoText:
    if b"\0" in content:
        utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return NoText.ENCODING if utf_16 else NoText.BINARY
    try:
        return content.decode()
    except UnicodeDecodeError:
        return NoText.ENCODING


@dataclass(frozen=True)
class JsonLines:
    """Consecutive lines of a JSONL file; keyed by text, so that duplicates stay together."""

    path: Path
    first_line: int  # counted from 1
    lines: tuple[bytes, ...]
    column: str
    size: int

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.first_line}"

    def read(self) -> Iterator[Document]:
        for number, line in enumerate(self.lines, self.first_line):
            if line.strip():
                where = f"{self.path}, line {number}"
                text = _record_text(line, self.column, where)
                yield Document(text, text, where)


def _record_text(line: bytes, column: str, where: str) -> str:
    try:
        record = json.loads(line)
        text = record.get(column) if isinstance(record, dict) else None
        if isinstance(text, str):
            return text
        reason = _without(column, record)
    except RecursionError:
        reason = "is JSON nested too deeply to be read"
    except ValueError as error:
        reason = f"is not JSON: {error}"
    raise DataError(f"{where}, {reason}")


def _without(column: str, record: object) -> str:
    """What a record has in the place of its text."""
    if not isinstance(record, dict):
        return f"is no object with a key {column!r}"
    if column in record:
        return f"holds {_short(json.dumps(record[column]))} under {column!r}, which is no text"
    return f"has no text under {column!r} (its keys are {_short(', '.join(record), 200)})"


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


@dataclass(frozen=True)
class RowGroup:
    """One row group of a Parquet file; keyed by text. Null rows are passed over."""

    path: Path
    index: int
    column: str
    size: int

    @property
    def where(self) -> str:
        return f"{self.path}, row group {self.index}"

    def read(self) -> Iterator[Document]:
        with _open_parquet(self.path) as parquet, _named(self.where):
            first = sum(parquet.metadata.row_group(i).num_rows for i in range(self.index))
            rows = parquet.iter_batches(row_groups=[self.index], columns=[self.column])
            for batch in rows:
                for number, text in enumerate(batch.column(0).to_pylist(), first):
                    if text is not None:
                        yield Document(text, text, f"{self.path}, row {number}")
                first += len(batch)


def _open_parquet(path: Path) -> ParquetFile:
    from pyarrow.parquet import ParquetFile

    with _named(str(path)):
        return ParquetFile(path, page_checksum_verification=True)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Arrow's errors, which do not say in which file."""
    from pyarrow import ArrowException

    try:
        yield
    except DataError:
        raise
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{where} cannot be read: {' '.join(str(error).split())}") from None


def find_files(inputs: list[Path], pattern: str) -> list[SourceFile]:
    """Files named in `inputs`, and those matching `pattern` in its folders, in order of name.

    Hidden folders and folders of installed packages are not entered.

    Raises:
        DataError: for an input that does not exist, or when nothing is found.
    """
    files = []
    for given in inputs:
        if given.is_file():
            files.append(SourceFile(given, given.name, given.stat().st_size))
        elif given.is_dir():
            files += [
                SourceFile(path, path.relative_to(given).as_posix(), path.stat().st_size)
                for path in sorted(given.rglob(pattern))
                if _wanted(path.relative_to(given)) and path.is_file()
            ]
        else:
            raise DataError(f"there is no file or folder {given}")
    if not files:
        raise DataError(f"no file matches {pattern!r} in {', '.join(map(str, inputs))}")
    return files


def _wanted(inside: Path) -> bool:
    return not any(part in _SKIPPED_FOLDERS or part.startswith(".") for part in inside.parts)


def cut(files: list[SourceFile], column: str) -> Iterator[Piece]:
    """The pieces of all files, in order.

    Raises:
        DataError: for a file that is not what its name says, or that lacks `column`.
    """
    texts: list[SourceFile] = []
    for file in files:
        if file.kind == "text":
            texts.append(file)
            if sum(text.size for text in texts) >= PIECE_BYTES:
                yield TextFiles(tuple(texts))
                texts = []
        elif file.kind == "jsonl":
            yield from _cut_json_lines(file, column)
        else:
            yield from _cut_parquet(file, column)
    if texts:
        yield TextFiles(tuple(texts))


def _cut_json_lines(file: SourceFile, column: str) -> Iterator[Piece]:
    with file.path.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if file.path.suffix == ".gz" else raw
        number, position = 1, 0
        while True:
            try:
                lines = stream.readlines(PIECE_BYTES)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{file.path} cannot be read to its end: {error}") from None
            if not lines:
                return
            before, position = position, raw.tell()
            yield JsonLines(file.path, number, tuple(lines), column, position - before)
            number += len(lines)


def _cut_parquet(file: SourceFile, column: str) -> Iterator[Piece]:
    with _open_parquet(file.path) as parquet:
        with _named(str(file.path)):
            names = parquet.schema_arrow.names
            groups = parquet.num_row_groups
            kind = str(parquet.schema_arrow.field(column).type) if column in names else ""
        if not kind:
            known = _short(", ".join(names), 200)
            raise DataError(f"{file.path} has no column {column!r} (it has {known})")
        if kind not in ("string", "large_string", "string_view"):
            raise DataError(f"column {column!r} of {file.path} holds {kind}, not text")
        for index in range(groups):
            share = file.size * (index + 1) // groups - file.size * index // groups
            yield RowGroup(file.path, index, column, share)


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part: a pure function of its key."""
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
