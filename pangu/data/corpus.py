"""A prepared corpus: a folder that is complete or absent.

    DIR/train.bin, train.idx             Megatron indexed dataset, one document per input document
    DIR/validation.bin, validation.idx   its held-out part, absent when nothing was held out
    DIR/tokenizer.json … , tokenizer_info.json
    DIR/SHA256SUMS                       checksums of all other files, as `sha256sum` writes them
    DIR/corpus.json                      documents, tokens and text bytes of each part, and the
                                         files that are no text

Everything is written into `.DIR.partial` beside it and renamed at the end. A preparation that was
killed goes on there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from filelock import FileLock
from pydantic import TypeAdapter
from tqdm import tqdm

from pangu.data import DataError, sources
from pangu.data.checksums import write_checksums
from pangu.data.sources import NoText, Piece, SourceFile, cut, find_files, is_held_out
from pangu.data.tokenizer import Tokenizer, load_tokenizer, train_byte_level_bpe
from pangu.data.unfinished import DIGEST_BYTES, PARTS, Unfinished, digest_of

INFO_FILE = "corpus.json"
# Text that a tokenizer is trained on, taken evenly from a larger input.
TOKENIZER_TRAINING_BYTES = 1 << 28
COMMIT_PIECES = 8  # of the input, after which what is written is brought to the disk
_NAMED = 3  # files that are no text, of each kind


@dataclass(frozen=True)
class Preparation:
    """What to prepare. Exactly one of `tokenizer` and `train_tokenizer` is set."""

    inputs: list[Path]
    output: Path
    tokenizer: Path | None = None
    train_tokenizer: int | None = None  # vocabulary size
    eod: str | None = None
    column: str = "text"
    pattern: str = "*"
    held_out: float = 0.01  # fraction of the documents
    deduplicate: bool = False  # keep one of documents whose text is the same
    workers: int = 1


@dataclass
class LeftOut:
    """Files that are no text: how many, and the first of them."""

    files: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.files += 1
        if len(self.first) < _NAMED:
            self.first.append(name)


@dataclass
class CorpusInfo:
    """Size of a corpus, by part, and what was left out, by `NoText`."""

    vocab_size: int
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    duplicates: int = 0  # documents left out, whose text is in the corpus already
    left_out: dict[str, LeftOut] = field(default_factory=dict)


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a corpus that was prepared to its end."""
    return (folder / INFO_FILE).is_file()


def read_info(folder: Path) -> CorpusInfo:
    """The size of the corpus in `folder`."""
    return TypeAdapter(CorpusInfo).validate_json((folder / INFO_FILE).read_bytes())


class KilledWorker(DataError):
    """A process that tokenises was killed: what is written stays, for the next attempt."""


def prepare(job: Preparation) -> CorpusInfo:
    """Tokenise the inputs into a new corpus folder, from where a killed preparation of the same
    inputs with the same options has come.

    Raises:
        DataError: for input that cannot be used, or when the output exists already.
    """
    files = find_files(job.inputs, job.pattern)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(job.output.parent / f".{job.output.name}.lock"):
        if job.output.exists():
            raise DataError(f"{job.output} exists already: name another --output or remove it")
        partial = job.output.parent / f".{job.output.name}.partial"
        progress = job.output.parent / f".{job.output.name}.progress"
        unfinished = Unfinished(partial, progress, digest_of(_options(job), files))
        keep = False
        try:
            info = _write_corpus(job, files, unfinished)
            (partial / INFO_FILE).write_text(json.dumps(asdict(info), indent=2))
            write_checksums(partial)
            _flush_to_disk(partial)
            partial.rename(job.output)
        except OSError as error:
            if error.filename is not None:
                raise
            # what a full disk says does not name it
            raise DataError(f"{job.output} cannot be written: {error.strerror}") from None
        except (KeyboardInterrupt, KilledWorker):
            keep = True
            raise
        finally:
            if not keep:
                unfinished.remove()
    return info


def _options(job: Preparation) -> list[object]:
    """All beside the inputs that decides what is written."""
    tokenizer = _ages(job.tokenizer) if job.tokenizer else job.train_tokenizer
    selected = [job.eod, job.column, job.held_out, job.deduplicate]
    return [tokenizer, *selected, sources.PIECE_BYTES]


def _ages(tokenizer: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and ages of a tokenizer's files."""
    files = sorted(tokenizer.glob("tokenizer*")) if tokenizer.is_dir() else [tokenizer]
    there = [(str(file.resolve()), file.stat()) for file in files if file.exists()]
    return [(name, found.st_size, found.st_mtime_ns) for name, found in there]


def _write_corpus(job: Preparation, files: list[SourceFile], unfinished: Unfinished) -> CorpusInfo:
    total = sum(file.size for file in files)
    tokenizer = _tokenizer_of(job, files, unfinished)
    progress, info = unfinished.progress, CorpusInfo(tokenizer.vocab_size)
    unfinished.open(tokenizer.vocab_size)
    if unfinished.goes_on:
        info = TypeAdapter(CorpusInfo).validate_python(progress.counted)
    else:
        unfinished.commit(0, asdict(info))
    first_time = _first_time(job, unfinished.digests())
    pieces = cut(files, job.column)
    written, done = progress.pieces, sum(piece.size for piece in islice(pieces, progress.pieces))
    if written:
        size = tqdm.format_sizeof(done, "B")
        print(f"going on behind {size} that a killed preparation has written", file=sys.stderr)
    options = {"total": total, "initial": done, "unit": "B", "unit_scale": True}
    with tqdm(**options, desc="tokenising") as bar:
        for piece, encoded in _encode_in_order(
            pieces, unfinished.folder, job.held_out, job.workers
        ):
            _add(encoded, unfinished, info, first_time, keep_digests=job.deduplicate)
            written += 1
            if written % COMMIT_PIECES == 0:
                unfinished.commit(written, asdict(info))
            bar.update(piece.size)
    if not info.documents["train"]:
        skipped = sum(some.files for some in info.left_out.values())
        aside = f" ({skipped:,} files are binary or not UTF-8)" if skipped else ""
        raise DataError(f"no document with UTF-8 text in {', '.join(map(str, job.inputs))}{aside}")
    unfinished.finish(written, asdict(info))
    return info


def _add(
    encoded: Encoded,
    unfinished: Unfinished,
    info: CorpusInfo,
    first_time: Callable[[bytes], bool],
    *,
    keep_digests: bool,
) -> None:
    """Write a piece's documents, and count them."""
    for part, every in encoded.parts.items():
        some = every.keep([first_time(digest) for digest in every.digests])
        unfinished.add(part, some.tokens, some.lengths, some.digests if keep_digests else ())
        info.documents[part] += len(some.lengths)
        info.tokens[part] += len(some.tokens)
        info.text_bytes[part] += int(some.text_bytes.sum())
        info.duplicates += len(every.lengths) - len(some.lengths)
    for name, reason in encoded.left_out:
        info.left_out.setdefault(reason.value, LeftOut()).add(name)


def _tokenizer_of(job: Preparation, files: list[SourceFile], unfinished: Unfinished) -> Tokenizer:
    """The tokenizer, whose files are in the folder from then on."""
    folder = unfinished.folder
    if unfinished.goes_on:
        return load_tokenizer(folder)
    if job.train_tokenizer is not None:
        total = sum(file.size for file in files)
        stride = max(1, -(-total // TOKENIZER_TRAINING_BYTES))
        texts = _training_texts(job, cut(files, job.column), stride, total)
        return train_byte_level_bpe(texts, job.train_tokenizer, folder, job.eod)
    assert job.tokenizer is not None
    tokenizer = load_tokenizer(job.tokenizer, job.eod)
    tokenizer.save(folder)
    return tokenizer


def _training_texts(
    job: Preparation, pieces: Iterator[Piece], stride: int, total: int
) -> Iterator[str]:
    first_time = _first_time(job, set())
    with tqdm(total=total, unit="B", unit_scale=True, desc="training the tokenizer") as bar:
        for number, piece in enumerate(pieces):
            if number % stride == 0:
                for document in piece.read():
                    text = document.text
                    if isinstance(text, str) and not is_held_out(document.key, job.held_out):
                        text = _printable(text)
                        if first_time(_text_digest(text)):
                            yield text
            bar.update(piece.size)


def _first_time(job: Preparation, seen: set[bytes]) -> Callable[[bytes], bool]:
    """Whether a text's digest is new beside those `seen`; with `deduplicate` off, each is."""

    def first_time(digest: bytes) -> bool:
        new = digest not in seen
        seen.add(digest)
        return new

    return first_time if job.deduplicate else lambda digest: True


def _text_digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class EncodedPart:
    """Documents of a piece: in few arrays, which are quick to hand to another process."""

    tokens: np.ndarray  # `[sum(lengths)]` int32, each document's last being its end
    lengths: np.ndarray  # `[documents]`
    text_bytes: np.ndarray  # `[documents]`
    digests: list[bytes]  # of the texts

    def keep(self, wanted: list[bool]) -> EncodedPart:
        """The documents that are `wanted`, of all."""
        if all(wanted):
            return self
        return EncodedPart(
            self.tokens[np.repeat(wanted, self.lengths)],
            self.lengths[wanted],
            self.text_bytes[wanted],
            [digest for digest, want in zip(self.digests, wanted, strict=True) if want],
        )


@dataclass(frozen=True)
class Encoded:
    """A piece: its documents by part, and the files that are none."""

    parts: dict[str, EncodedPart]
    left_out: list[tuple[str, NoText]]


def _encode_in_order(
    pieces: Iterator[Piece], tokenizer: Path, held_out: float, workers: int
) -> Iterator[tuple[Piece, Encoded]]:
    """Encode pieces in parallel; yields them in the order of the input, few at a time."""
    pool = ProcessPoolExecutor(
        workers,
        # not fork: the tokenizer's own threads may hold locks in this process
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, held_out),
    )
    waiting: deque[tuple[Piece, Future[Encoded]]] = deque()
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(_encode, piece)))
            if len(waiting) > 2 * workers:
                yield waiting[0][0], waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield waiting[0][0], waiting[0][1].result()
            waiting.popleft()
        # A process that starts late still reads the tokenizer, whose folder is about to be renamed.
        pool.shutdown()
    except BrokenProcessPool as error:
        near = f" at or after {waiting[0][0].where}" if waiting else ""
        raise KilledWorker(
            f"a tokenising process was killed{near}, for lack of memory perhaps: the same command "
            "goes on from there; try fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_tokenizer: Tokenizer
_held_out: float


def _start_worker(tokenizer: Path, held_out: float) -> None:
    global _tokenizer, _held_out
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokenizer, _held_out = load_tokenizer(tokenizer), held_out
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _encode(piece: Piece) -> Encoded:
    rows: dict[str, list[tuple[np.ndarray, int, bytes]]] = {part: [] for part in PARTS}
    left_out = []
    for document in piece.read():
        text = document.text
        if isinstance(text, NoText):
            left_out.append((document.key, text))
            continue
        if not text:
            continue
        part = "validation" if is_held_out(document.key, _held_out) else "train"
        text = _printable(text)
        tokens = np.array([*_token_ids(text, document.where), _tokenizer.eod], np.int32)
        rows[part].append((tokens, len(text.encode()), _text_digest(text)))
    return Encoded({part: _joined(some) for part, some in rows.items() if some}, left_out)


def _joined(rows: list[tuple[np.ndarray, int, bytes]]) -> EncodedPart:
    tokens, text_bytes, digests = zip(*rows, strict=True)
    lengths = np.array([len(some) for some in tokens])
    return EncodedPart(np.concatenate(tokens), lengths, np.array(text_bytes), list(digests))


def _token_ids(text: str, where: str) -> list[int]:
    try:
        return _tokenizer.encode(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what a library written in Rust gives up with is no Exception
        raise DataError(
            f"{where} cannot be tokenised ({len(text):,} characters): {error}"
        ) from None


def _printable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and has no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _flush_to_disk(folder: Path) -> None:
    """So that the rename cannot outlive the content in a power failure."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
