"""A changed bit in a corpus: never trained on in silence, always a sentence that names the file."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from drills.data_damages import CORPORA, TEXTS, main
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from configs.compose import load
from configs.schema import Config
from pangu.data import DataError, checksums, files
from pangu.data.checksums import SUMS_FILE
from pangu.data.index_file import read_structure


def config_of(folder: Path, cache: Path, *more: str) -> Config:
    config = load(["data=indexed", f"data.cache_dir={cache}", "model.vocab_size=512", *more])
    config.data.blend = {str(folder): 1.0}
    return config


def reasons(config: Config) -> list[str]:
    return [violation.reason for violation in files.faults(config)]


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "copy"))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A prefix as Megatron's own tools write it: 50 documents, no checksums, 4 bytes a token."""
    prefix = tmp_path / "foreign"
    draw = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in draw.integers(20, 60, 50):
        builder.add_document(draw.integers(0, 300, length), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_every_flipped_bit_of_a_prepared_corpus_is_found(copy: Path, tmp_path: Path) -> None:
    """48 bits at random, of index, tokens, held-out part, tokenizer and checksums."""
    config = config_of(copy, tmp_path / "cache")
    assert reasons(config) == []
    draw = random.Random(10)
    names = ["train.idx", "train.bin", "validation.idx", "validation.bin"] * 9
    names += ["tokenizer.json", "tokenizer_info.json", SUMS_FILE] * 4
    for name in names:
        path = copy / name
        before = path.read_bytes()
        # the list's first line is of corpus.json, which no run reads
        first = before.index(b"\n") + 1 if name == SUMS_FILE else 0
        byte, bit = draw.randrange(first, len(before)), draw.randrange(8)
        flip(path, byte, bit)
        found = reasons(config)
        assert found, f"bit {bit} of byte {byte} of {name} passed in silence"
        assert any(name in reason for reason in found), found
        path.write_bytes(before)
    assert reasons(config) == []


def test_structure_alone_finds_what_it_can(foreign: Path, corpus: Path, tmp_path: Path) -> None:
    """Files without checksums: each bit of the header, of lengths and of pointers, and every
    order of documents that goes backwards."""
    config = config_of(foreign, tmp_path / "cache", f"data.tokenizer={corpus}")
    assert reasons(config) == []
    path = Path(f"{foreign}.idx")
    before = path.read_bytes()
    flips = [(byte, bit) for byte in range(34) for bit in range(8)]
    draw = random.Random(1)
    flips += [(draw.randrange(34, 34 + 50 * 12), draw.randrange(8)) for _ in range(60)]
    for byte, bit in flips:
        flip(path, byte, bit)
        with pytest.raises(DataError, match=r"foreign\.(idx|bin) "):
            read_structure(foreign)
        path.write_bytes(before)
    documents = 34 + 50 * 12
    for position, value in ((0, 1), (7, 3), (7, -1), (7, 51), (50, 49)):
        changed = bytearray(before)
        changed[documents + 8 * position :][:8] = b""
        struct.pack_into("<q", changed, documents + 8 * position, value)
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"foreign\.idx is damaged: (its|document \d+)"):
            read_structure(foreign)
    path.write_bytes(before + b"\0")
    with pytest.raises(DataError, match="bytes where its counts make"):
        read_structure(foreign)
    path.write_bytes(before + bytes(50))  # a modality per sequence
    assert read_structure(foreign).tokens == Path(f"{foreign}.bin").stat().st_size // 4


def test_tokens_out_of_range_are_found_before_the_run(
    foreign: Path, corpus: Path, tmp_path: Path
) -> None:
    config = config_of(foreign, tmp_path / "cache", f"data.tokenizer={corpus}")
    assert reasons(config) == []
    flip(Path(f"{foreign}.bin"), 4 * 77 + 3, 7)
    (reason,) = reasons(config)
    assert reason.startswith(f"{foreign}.bin holds token -2147483")
    flip(Path(f"{foreign}.bin"), 4 * 77 + 3, 7)
    flip(Path(f"{foreign}.bin"), 4 * 77 + 1, 4)
    (reason,) = reasons(config)
    assert "but model.vocab_size is 512: it was written with another tokenizer" in reason
    config.data.verify = False
    assert reasons(config) == []


def test_a_file_is_read_once_unless_asked(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = checksums._read
    monkeypatch.setattr(
        checksums, "_read", lambda path, tokens: read.append(path.name) or real(path, tokens)
    )
    config = config_of(copy, tmp_path / "cache")
    everything = ["train.idx", "train.bin", "validation.idx", "validation.bin"]
    assert reasons(config) == []
    assert read == everything
    assert reasons(config) == []
    assert read == everything, "remembered"

    # Bits that rot leave size and age as they were: only reading again finds them.
    path = copy / "train.bin"
    stat = path.stat()
    flip(path, 100, 0)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert reasons(config) == []
    config.data.verify = True
    (reason,) = reasons(config)
    assert reason == f"{path} is damaged: its content is not what {copy / SUMS_FILE} says"
    assert read == everything * 2
    flip(path, 100, 0)
    assert reasons(config) == []
    read.clear()
    assert files.faults(config, just_read=True) == []
    assert read == []

    config.data.verify = None
    os.utime(path)
    assert reasons(config) == []
    assert read == ["train.bin"], "another age"
    for note in (tmp_path / "cache" / "verified").glob("*.json"):
        note.write_text("{")
    assert reasons(config) == []
    assert read == ["train.bin", *everything], "broken notes are not believed"
    monkeypatch.setattr(files, "CHEAP_BYTES", 10)
    flip(path, 100, 0)
    assert reasons(config) == [], "too large to be read unasked"
    config.data.verify = True
    assert len(reasons(config)) == 1


def test_a_cache_that_cannot_be_written_is_done_without(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    config = config_of(copy, tmp_path / "cache")
    assert reasons(config) == []
    flip(copy / "train.bin", 5, 3)
    assert len(reasons(config)) == 1


def test_checksums_are_those_of_sha256sum(copy: Path) -> None:
    command = ["sha256sum", "--check", "--strict", SUMS_FILE]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True)
    names = {path.name for path in copy.iterdir()} - {SUMS_FILE}
    assert done.stdout.count(": OK") == len(names) == 7
    (copy / SUMS_FILE).write_text("")  # of an earlier version, or of other tools
    assert checksums.read_checksums(copy) == {}


def test_real_commands_refuse_what_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Three of the drill's damages; all of them: `python -m tests.drills.data_damages`."""
    assert main(["jsonl: nested 100,000 deep", "bin: a bit", "idx: a length"]) == 0
    table = capsys.readouterr().out
    assert table.count("| refused |") == 4
    assert "a.jsonl, line 301, is JSON nested too deeply to be read" in table
    assert table.endswith("3 damages, 0 wrong\n")
    assert len(TEXTS) + len(CORPORA) >= 50


def test_the_doctor_finds_what_the_trainer_refuses(copy: Path, tmp_path: Path) -> None:
    flip(copy / "train.bin", 1000, 2)
    arguments = ["data=indexed", "data.blend={copy: 1.0}", "run_dir=run", "launch.processes=2"]
    done = subprocess.run(
        [sys.executable, "-m", "pangu.doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert "copy/train.bin is damaged" in done.stderr
    assert "Traceback" not in done.stderr
