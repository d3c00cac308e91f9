"""Damaged texts, tokenizers and corpora: `python -m tests.drills.data_damages [NAME…]`.

Each damage is done to a copy, then the real command runs: `pangu.data.prepare` on texts and
tokenizers, `pangu.train` on corpora. It must end with exit code 2 and a sentence that names the
file, without a traceback, and leave neither a corpus nor a run behind.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
HEADER = 34  # bytes of an index before its lengths
RECORDS = b"".join(b'{"text": "record %d says as much as %d"}\n' % (i, i * i) for i in range(300))


def flipped(content: bytes, position: int, bit: int = 0) -> bytes:
    position %= len(content)
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def parquet(position: int | None = None, **options: object) -> bytes:
    """A table of two row groups, a byte changed in the middle of the second's page."""
    file = io.BytesIO()
    table = pa.table({"text": [f"row {i} says {i * i}" for i in range(300)]})
    pq.write_table(table, file, row_group_size=150, use_dictionary=False, **options)
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    middle = column.data_page_offset + column.total_compressed_size // 2
    return flipped(file.getvalue(), middle if position is None else position, 6)


def table_of(column: pa.Array) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": column}), file)
    return file.getvalue()


# Name of the damage: name of the file, its content.
TEXTS: dict[str, tuple[str, bytes]] = {
    "empty text": ("a.txt", b""),
    "empty jsonl": ("a.jsonl", b"\n\n"),
    "jsonl.gz: first byte of the data": ("a.jsonl.gz", flipped(gzip.compress(RECORDS), 10, 2)),
    "jsonl.gz: a byte in the middle": ("a.jsonl.gz", flipped(gzip.compress(RECORDS), 700, 3)),
    "jsonl.gz: its checksum": ("a.jsonl.gz", flipped(gzip.compress(RECORDS), -6)),
    "jsonl.gz: cut short": ("a.jsonl.gz", gzip.compress(RECORDS)[:-300]),
    "jsonl.gz: not gzip": ("a.jsonl.gz", RECORDS),
    "txt.gz: a byte in the middle": ("a.txt.gz", flipped(gzip.compress(RECORDS), 700, 3)),
    "txt.gz: cut short": ("a.txt.gz", gzip.compress(RECORDS)[:-3]),
    "jsonl: nested 100,000 deep": ("a.jsonl", RECORDS + b"[" * 100_000),
    "jsonl: nested where text should be": (
        "a.jsonl",
        RECORDS + b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}",
    ),
    "jsonl: cut short": ("a.jsonl", RECORDS[:-9]),
    "jsonl: not UTF-8": ("a.jsonl", RECORDS + b'{"text": "\xff\xfe"}'),
    "jsonl: a number of 10,000 digits": ("a.jsonl", RECORDS + b'{"text": %s}' % (b"9" * 10_000)),
    "jsonl: a number for a text": ("a.jsonl", RECORDS + b'{"text": 7}'),
    "jsonl: another key": ("a.jsonl", RECORDS + b'{"body": "x"}'),
    "jsonl: null bytes": ("a.jsonl", RECORDS + bytes(1000)),
    "parquet: empty": ("a.parquet", b""),
    "parquet: cut short": ("a.parquet", parquet(0)[:-100]),
    "parquet: another magic": ("a.parquet", parquet(-1)),
    "parquet: its metadata": ("a.parquet", parquet(-60)),
    "parquet: a compressed page": ("a.parquet", parquet(compression="gzip")),
    "parquet: a page with a checksum": (
        "a.parquet",
        parquet(compression="none", write_page_checksum=True),
    ),
    "parquet: numbers": ("a.parquet", table_of(pa.array([1, 2]))),
    "parquet: not UTF-8": (
        "a.parquet",
        table_of(
            pa.StringArray.from_buffers(
                1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xff")
            )
        ),
    ),
}


def flip(name: str, position: int, bit: int = 0) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(flipped((folder / name).read_bytes(), position, bit))

    return damage


def cut(name: str, end: int | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:end])

    return damage


def longer(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes() + bytes(8))

    return damage


def exchanged(folder: Path) -> None:
    shutil.copy(folder / "validation.bin", folder / "train.bin")


def nested(folder: Path) -> None:
    (folder / "tokenizer_info.json").write_text("[" * 100_000)


# Name of the damage: the file that must be named, and what is done to a corpus.
CORPORA: dict[str, tuple[str, Callable[[Path], None]]] = {
    "idx: magic": ("train.idx", flip("train.idx", 2)),
    "idx: version": ("train.idx", flip("train.idx", 9, 1)),
    "idx: token type": ("train.idx", flip("train.idx", 17, 2)),
    "idx: token type, as wide": ("train.idx", flip("train.idx", 17, 3)),
    "idx: number of sequences": ("train.idx", flip("train.idx", 18, 1)),
    "idx: number of sequences, huge": ("train.idx", flip("train.idx", 25, 7)),
    "idx: number of documents": ("train.idx", flip("train.idx", 26, 0)),
    "idx: a length": ("train.idx", flip("train.idx", HEADER + 8, 3)),
    "idx: a negative length": ("train.idx", flip("train.idx", HEADER + 7, 7)),
    "idx: a pointer or document": ("train.idx", flip("train.idx", -800, 1)),
    "idx: the last document": ("train.idx", flip("train.idx", -8, 0)),
    "idx: cut short": ("train.idx", cut("train.idx", -8)),
    "idx: empty": ("train.idx", cut("train.idx", 0)),
    "idx: longer": ("train.idx", longer("train.idx")),
    "bin: a bit": ("train.bin", flip("train.bin", 1001, 0)),
    "bin: a bit beyond the vocabulary": ("train.bin", flip("train.bin", 1001, 7)),
    "bin: cut short": ("train.bin", cut("train.bin", -2)),
    "bin: empty": ("train.bin", cut("train.bin", 0)),
    "bin: longer": ("train.bin", longer("train.bin")),
    "bin: of another part": ("train.bin", exchanged),
    "held-out bin: a bit": ("validation.bin", flip("validation.bin", 100, 4)),
    "held-out idx: a bit": ("validation.idx", flip("validation.idx", 100, 4)),
    "tokenizer: a bit": ("tokenizer.json", flip("tokenizer.json", 3000, 1)),
    "tokenizer: cut short": ("tokenizer.json", cut("tokenizer.json", -500)),
    "tokenizer's description: a bit": ("tokenizer_info.json", flip("tokenizer_info.json", -20)),
    "tokenizer's description: deep": ("tokenizer_info.json", nested),
    "checksums: a bit": ("SHA256SUMS", flip("SHA256SUMS", 200, 1)),
    "checksums: a line's end": ("SHA256SUMS", flip("SHA256SUMS", -1, 2)),
    "checksums: cut short": ("SHA256SUMS", cut("SHA256SUMS", -30)),
}


def module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", name, *map(str, arguments)]


def make_corpus(folder: Path) -> None:
    """`folder/corpus`: 300 records, a fifth of them held out."""
    (folder / "records.jsonl").write_bytes(RECORDS)
    options = ("--output", "corpus", "--train-tokenizer", 300, "--held-out", 0.2, "--workers", 1)
    subprocess.run(
        module("pangu.data.prepare", "records.jsonl", *options),
        cwd=folder,
        env=environment(),
        check=True,
        capture_output=True,
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def attempt(name: str, corpus: Path, folder: Path) -> list[tuple[str, subprocess.CompletedProcess]]:
    """The file that must be named, and what the command did, for each way to meet the damage."""
    commands = []
    if name in TEXTS:
        file, content = TEXTS[name]
        (folder / file).write_bytes(content)
        shutil.copytree(corpus, folder / "corpus")
        common = (file, "--output", "out", "--workers", 1)
        commands += [
            module("pangu.data.prepare", *common, *tokenizer)
            for tokenizer in (("--tokenizer", "corpus"), ("--train-tokenizer", 300))
        ]
    else:
        file, damage = CORPORA[name]
        damage(Path(shutil.copytree(corpus, folder / "corpus")))
        model = ("model.vocab_size=300", "train.seq_length=32", "train.steps=2", "run_dir=out")
        blend = ("data=indexed", "data.blend={corpus: 1}")
        commands.append(module("pangu.train", *blend, *model))
    return [
        (
            file,
            subprocess.run(
                command,
                cwd=folder,
                env=environment(),
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            ),
        )
        for command in commands
    ]


def wrong_with(file: str, done: subprocess.CompletedProcess, folder: Path) -> str:
    if done.returncode == 0:
        return "silent"
    if "Traceback" in done.stderr:
        return "traceback"
    if done.returncode != 2:
        return f"exit code {done.returncode}"
    if file not in done.stderr:
        return f"{file} is not named"
    if left := [path.name for path in folder.glob("*out*") if path.suffix != ".lock"]:
        return f"left behind: {', '.join(left)}"
    return ""


def sentence(stderr: str) -> str:
    """What was said, of a table its words."""
    if "error: " in stderr:
        return stderr.rpartition("error: ")[2].strip()
    rows = [line.split("│")[1:-1] for line in stderr.splitlines() if line.startswith("│")]
    return " ".join(" ".join(row[2] for row in rows if len(row) > 2).split())


def main(names: list[str]) -> int:
    """Print a table of outcomes; 1 when one of them is wrong."""
    bad = 0
    chosen = [name for name in (*TEXTS, *CORPORA) if not names or name in names]
    print("| damage | outcome | what was said |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as top:
        make_corpus(Path(top))
        for name in chosen:
            with tempfile.TemporaryDirectory() as folder:
                for file, done in attempt(name, Path(top) / "corpus", Path(folder)):
                    wrong = wrong_with(file, done, Path(folder))
                    bad += bool(wrong)
                    print(
                        f"| {name} | {wrong or 'refused'} | {sentence(done.stderr)} |", flush=True
                    )
    print(f"{len(chosen)} damages, {bad} wrong")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
