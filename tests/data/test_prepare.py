"""Preparing corpora: every source, the split, the command line, and what an interruption leaves."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from pangu.data import DataError, sources, stdlib
from pangu.data.corpus import Preparation, prepare, read_info
from pangu.data.prepare import app
from pangu.data.sources import cut, find_files, is_held_out
from pangu.data.tokenizer import load_tokenizer

TEXTS = [f"document {i}: größe {i * i} 专家\nsecond line" for i in range(300)]


def documents(folder: Path, part: str = "train") -> list[str]:
    """The texts of one part, without their end-of-document tokens."""
    tokenizer = load_tokenizer(folder)
    dataset = IndexedDataset(str(folder / part))
    assert np.array_equal(dataset.document_indices, np.arange(len(dataset) + 1))
    rows = [dataset[i].tolist() for i in range(len(dataset))]
    assert all(row[-1] == tokenizer.eod and tokenizer.eod not in row[:-1] for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and output of the command."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def make_source(kind: str, folder: Path) -> Path:
    folder.mkdir()
    records = [json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS)]
    if kind == "jsonl":
        path = folder / "a.jsonl"
        path.write_text("\n\n".join(records))  # blank lines, and none at the end
    elif kind in ("jsonl.gz", "json.gz"):
        path = folder / f"a.{kind}"
        path.write_bytes(gzip.compress("\n".join(records).encode()))
    elif kind == "parquet":
        path = folder / "a.parquet"
        column = [*TEXTS[:100], None, *TEXTS[100:]]
        pq.write_table(pa.table({"id": range(301), "text": column}), path, row_group_size=70)
    else:
        for i, text in enumerate(TEXTS):
            (folder / f"{i:03}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json.gz", "parquet", "text"])
def test_every_source_gives_the_same_documents(kind: str, corpus: Path, tmp_path: Path) -> None:
    source = make_source(kind, tmp_path / "source")
    output = tmp_path / "out"
    code, text = run(source, "--output", output, "--tokenizer", corpus, "--held-out", 0.2)
    assert code == 0, text
    info = read_info(output)
    train, held_out = documents(output), documents(output, "validation")
    keys = [f"{i:03}.txt" for i in range(300)] if kind == "text" else TEXTS
    assert train == [t for t, key in zip(TEXTS, keys, strict=True) if not is_held_out(key, 0.2)]
    assert held_out == [t for t, key in zip(TEXTS, keys, strict=True) if is_held_out(key, 0.2)]
    assert 35 <= len(held_out) <= 85
    assert info.documents == {"train": len(train), "validation": len(held_out)}
    assert info.text_bytes["train"] == len("".join(train).encode())
    for part in ("train", "validation"):
        assert info.tokens[part] == (output / f"{part}.bin").stat().st_size // 2
        assert f"{output / part}: {info.documents[part]} documents" in text


def test_the_result_does_not_depend_on_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many pieces, so that they may overtake each other."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 4096)
    source = tmp_path / "source"
    source.mkdir()
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    for name in ("a.jsonl", "b.jsonl"):
        (source / name).write_text(lines)
    assert sum(1 for _ in cut(find_files([source], "*"), "body")) > 10
    for workers in (1, 3):
        job = Preparation(
            [source], tmp_path / str(workers), train_tokenizer=270, column="body", workers=workers
        )
        assert prepare(job).documents["train"] > 550
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()


def test_the_tokenizer_is_trained_on_the_training_part_only(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(40):
        name = f"{i}.txt"
        word = "zzzz" if is_held_out(name, 0.3) else "abab"
        (source / name).write_text(f" {word}" * 50)
    prepare(Preparation([source], tmp_path / "out", train_tokenizer=270, held_out=0.3))
    tokenizer = load_tokenizer(tmp_path / "out")
    assert len(tokenizer.encode(" abab")) == 1
    assert len(tokenizer.encode(" zzzz")) == 5


def test_folders_are_searched_sensibly(corpus: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("b/x.py", "a.py", ".git/y.py", "__pycache__/z.py", "c/site-packages/w.py", "d.md"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "latin.py").write_bytes("größe".encode("latin-1"))
    (source / "binary.py").write_bytes(b"a\0b")
    (source / "empty.py").write_text("")
    (source / "packed.py.gz").write_bytes(gzip.compress(b"packed"))
    prepare(Preparation([source], tmp_path / "out", tokenizer=corpus, pattern="*.py*", held_out=0))
    assert documents(tmp_path / "out") == ["a.py", "b/x.py", "packed"]
    assert not (tmp_path / "out" / "validation.bin").exists()


def test_files_that_are_no_text_are_counted_and_named(corpus: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("größe")
    (source / "b.jsonl").write_text('{"text": "a record"}\n')
    for name in ("1.so", "2.so", "3.so", "4.so"):
        (source / name).write_bytes(b"\x7fELF\0\xff")
    (source / "latin.txt").write_bytes("größe".encode("latin-1"))
    (source / "windows.txt").write_bytes("größe".encode("utf-16"))
    out = tmp_path / "out"
    code, text = run(source, "--output", out, "--tokenizer", corpus, "--held-out", 0)
    assert code == 0, text
    assert "left out as binary: 4 (1.so, 2.so, 3.so, …)\n" in text
    assert "left out as not UTF-8: 2 (latin.txt, windows.txt)\n" in text
    info = read_info(out)
    assert {reason: some.files for reason, some in info.left_out.items()} == {
        "binary": 4,
        "not UTF-8": 2,
    }
    assert info.documents["train"] == 2
    everything = [source, "--pattern", "*.so", "--output", tmp_path / "none"]
    code, text = run(*everything, "--tokenizer", corpus)
    assert code == 2
    assert f"no document with UTF-8 text in {source} (4 files are binary or not UTF-8)" in text


def test_half_a_surrogate_pair_is_no_obstacle(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude80"}\n')
    prepare(Preparation([path], tmp_path / "out", tokenizer=corpus, held_out=0))
    assert documents(tmp_path / "out") == ["a ? b", "🚀"]


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :]


def damaged_parquet(checksums: bool = False) -> bytes:
    """Two row groups, the second's only page with a byte changed: compressed, it cannot be
    unpacked; plain, only a checksum tells."""
    file = io.BytesIO()
    compression = "none" if checksums else "gzip"
    pq.write_table(
        pa.table({"text": TEXTS}),
        file,
        row_group_size=150,
        compression=compression,
        use_dictionary=False,
        write_page_checksum=checksums,
    )
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    middle = column.data_page_offset + column.total_compressed_size // 2
    return flipped(file.getvalue(), middle)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', r"a.jsonl, line 3, is not JSON"),
        ("a.jsonl", b'{"body": "x"}', "line 1, has no text under 'text' (its keys are body)"),
        ("a.jsonl", b"[1]", "a.jsonl, line 1, is no object with a key 'text'"),
        ("a.jsonl", b'{"text": 3}', "line 1, holds 3 under 'text', which is no text"),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}" * 9999, mtime=0)[:-9],
            "a.jsonl.gz cannot be read to its end",
        ),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-9], "a.txt.gz cannot be read to its end"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read: "),
        (
            "a.jsonl.gz",
            flipped(gzip.compress(b'{"text": "x"}\n' * 9, mtime=0), 10),
            "its end: Error -3",
        ),
        ("a.txt.gz", flipped(gzip.compress(b"text" * 9, mtime=0), 10), "its end: Error -3"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 99999, "line 2, is JSON nested too deeply"),
        ("a.jsonl", b'{"text": ' + b'{"a":' * 400 + b"1" + b"}" * 400 + b"}", "line 1, holds {"),
        ("a.jsonl", b'{"text": %s}' % (b"9" * 9999), "line 1, is not JSON: Exceeds the limit"),
        ("a.jsonl", b'\n{"text": "\xff"}', "line 2, is not JSON: 'utf-8' codec"),
        ("a.parquet", damaged_parquet(), "a.parquet, row group 1 cannot be read: "),
        ("a.parquet", damaged_parquet(checksums=True), "could not verify page integrity, CRC"),
        ("a.txt", b"", "no document with UTF-8 text in"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("option", ["--tokenizer", "--train-tokenizer"])
def test_damaged_input_is_named(
    corpus: Path, tmp_path: Path, name: str, content: bytes, message: str, option: str
) -> None:
    """Whether the tokenizer's training meets it first or a tokenising process does."""
    (tmp_path / name).write_bytes(content)
    value = corpus if option == "--tokenizer" else 300
    code, text = run(tmp_path / name, "--output", tmp_path / "out", option, value, "--workers", 1)
    assert code == 2
    assert message in text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, ".out.lock"])


def test_mistakes_on_the_command_line(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "count": [1]}), table)
    for arguments, message in (
        ([table], "either --tokenizer or --train-tokenizer"),
        ([table, "--train-tokenizer", 300, "--held-out", 1.5], "--held-out 1.5 is not a fraction"),
        ([table, "--train-tokenizer", 300, "--workers", 0], "--workers 0 is not a number"),
        ([table, "--train-tokenizer", 10, "--column", "body"], "need 257"),
        ([tmp_path / "absent", "--train-tokenizer", 300], "there is no file or folder"),
        ([tmp_path, "--pattern", "*.md", "--train-tokenizer", 300], "no file matches '*.md'"),
        ([table, "--tokenizer", corpus], "has no column 'text' (it has body, count)"),
        ([table, "--tokenizer", corpus, "--column", "count"], "holds int64, not text"),
        ([table, "--tokenizer", corpus, "--eod", "END"], "has no token 'END'"),
        ([table, "--tokenizer", corpus, "--eod", ""], "--eod is empty"),
        ([table, "--train-tokenizer", 300, "--eod", "END"], "--eod END is a word that a text may"),
    ):
        code, text = run(*arguments, "--output", out)
        assert (code, message in text) == (2, True), text
        assert not out.exists()
    pq.write_table(pa.table({"text": ["one document"]}), table)
    code, text = run(table, "--tokenizer", corpus, "--output", out, "--held-out", 1e-9)
    assert (code, "none of 1 documents fell into the 1e-09" in text) == (0, True), text
    assert "Warning" not in text
    code, text = run(table, "--tokenizer", corpus, "--output", corpus)
    assert code == 2
    assert f"{corpus} exists already" in text


def test_the_end_of_document_of_a_trained_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text that says </doc> itself")
    out = tmp_path / "out"
    options = ["--train-tokenizer", 300, "--eod", "</doc>", "--held-out", 0]
    code, text = run(tmp_path / "a.txt", "--output", out, *options)
    assert code == 0, text
    tokenizer = load_tokenizer(out)
    assert tokenizer.decode([tokenizer.eod]) == "</doc>"
    assert documents(out) == ["a text that says </doc> itself"]


def test_one_of_equal_documents_is_kept_on_request(tmp_path: Path) -> None:
    """Across files, pieces and parts: a text on both sides would be validated on after training."""
    source = tmp_path / "source"
    source.mkdir()
    names = [f"{i}.txt" for i in range(40)]
    held_out = [name for name in names if is_held_out(name, 0.4)]
    assert 5 < len(held_out) < 35
    for name in names:
        (source / name).write_text(f"text {int(name[:-4]) % 10}")
    records = [{"text": f"text {i % 15}"} for i in range(60)]
    (source / "z.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = [source, "--train-tokenizer", 300, "--held-out", 0.4, "--workers", 2]
    code, text = run(*options, "--output", tmp_path / "all")
    assert code == 0, text
    assert "duplicates" not in text
    assert sum(read_info(tmp_path / "all").documents.values()) == 100
    code, text = run(*options, "--output", tmp_path / "once", "--deduplicate")
    assert code == 0, text
    assert "left out as duplicates: 85\n" in text
    train, validation = documents(tmp_path / "once"), documents(tmp_path / "once", "validation")
    assert sorted(train + validation) == sorted(f"text {i}" for i in range(15))
    info = read_info(tmp_path / "once")
    assert (info.duplicates, sum(info.documents.values())) == (85, 15)
    assert sum(info.text_bytes.values()) == sum(map(len, train + validation))
    assert info.tokens["train"] == (tmp_path / "once" / "train.bin").stat().st_size // 2


def test_argument_errors_do_not_wait_for_torch() -> None:
    code = (
        "import sys, pangu.data.prepare as p\n"
        "try: p.app(['nothing', '--output', 'out'])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_killed_preparation_leaves_nothing_that_looks_complete(
    corpus: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    source = Path(sysconfig.get_path("stdlib"))
    command = [sys.executable, "-m", "pangu.data.prepare", str(source), "--pattern", "*.py"]
    command += ["--tokenizer", str(corpus), "--output", str(out), "--workers", "1"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while not (partial / "train.bin").exists() or not (partial / "train.bin").stat().st_size:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert partial.exists()
    while _group_lives(process.pid):  # the worker leaves with its parent
        assert time.monotonic() < deadline
        time.sleep(0.05)
    small = make_source("text", tmp_path / "small")
    prepare(Preparation([small], out, tokenizer=corpus, held_out=0))
    assert documents(out) == TEXTS
    assert not partial.exists()


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_default_corpus_is_prepared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of the real standard library stands for all of it; three processes ask at once."""
    library = Path(sysconfig.get_path("stdlib"))
    part = tmp_path / "lib"
    (part / "email").mkdir(parents=True)
    for path in (library / "os.py", *(library / "email").glob("*.py")):
        (part / path.relative_to(library)).write_bytes(path.read_bytes())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(part))
    started = []
    real_run = subprocess.run
    monkeypatch.setattr(
        stdlib.subprocess, "run", lambda *a, **k: started.append(1) or real_run(*a, **k)
    )
    folders = []
    ask = [
        threading.Thread(
            target=lambda: folders.append(stdlib.prepare_standard_library(tmp_path / "c", 400))
        )
        for _ in range(3)
    ]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 3
    assert started == [1]
    info = read_info(folders[0])
    assert info.vocab_size == 400
    names = [path.relative_to(part).as_posix() for path in sorted(part.rglob("*.py"))]
    held_out = [name for name in names if is_held_out(name, stdlib.HELD_OUT)]
    expected = [(part / name).read_text() for name in names if name not in held_out]
    assert documents(folders[0]) == [text for text in expected if text]

    (part / "os.py").unlink()
    with pytest.raises(DataError, match=r"no standard library source in .*data=indexed"):
        stdlib.prepare_standard_library(tmp_path / "other", 400)


def test_a_vocabulary_beyond_two_bytes(tmp_path: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("w69999 w3 w65536")
    job = Preparation([tmp_path / "a.txt"], tmp_path / "out", tmp_path / "words.json", held_out=0)
    prepare(job)
    dataset = IndexedDataset(str(tmp_path / "out" / "train"))
    assert dataset[0].tolist() == [69999, 3, 65536, 70000]
