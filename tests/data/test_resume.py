"""A preparation that is killed goes on, and ends with the files of one that nobody disturbed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pangu.data import corpus as module
from pangu.data import sources
from pangu.data.corpus import Preparation, prepare

# Pieces so small that there are many; each is brought to the disk.
COMMAND = (
    "import sys\n"
    "from pangu.data import corpus, prepare, sources\n"
    "sources.PIECE_BYTES, corpus.COMMIT_PIECES = 1 << 13, 1\n"
    "prepare.app(sys.argv[1:])\n"
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_preparation_goes_on_to_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        lines = (f"record {i} of {number}: {i * i} and {i % 7}" for i in range(150))
        records = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (texts / f"{number:02}.jsonl").write_text(records)
    out, progress = tmp_path / "out", tmp_path / ".out.progress" / "progress.json"
    command = [sys.executable, "-c", COMMAND, str(texts), "--output", str(out), "--workers", "1"]
    command += ["--train-tokenizer", "300", "--deduplicate", "--held-out", "0.1"]

    def pieces() -> int:
        return json.loads(progress.read_text())["pieces"] if progress.exists() else 0

    for enough in (3, 6):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 400
        while pieces() < enough:
            assert process.poll() is None, "it has ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not out.exists()
    # What was written behind the last note is written again.
    with (tmp_path / ".out.partial" / "train.bin").open("ab") as file:
        file.write(b"half a piece")
    before = pieces()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"going on behind \S+B that a killed preparation has written", done.stderr)
    assert 6 <= before < sum(1 for _ in texts.iterdir()) * 2
    assert not list(tmp_path.glob(".out.p*"))

    monkeypatch.setattr(sources, "PIECE_BYTES", 1 << 13)
    straight = tmp_path / "straight"
    prepare(Preparation([texts], straight, train_tokenizer=300, held_out=0.1, deduplicate=True))
    assert contents(out) == contents(straight)


def test_another_preparation_starts_anew(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"record {i}"}) + "\n" for i in range(2000)))
    monkeypatch.setattr(sources, "PIECE_BYTES", 1 << 12)
    monkeypatch.setattr(module, "COMMIT_PIECES", 1)
    job = Preparation([source], tmp_path / "out", tokenizer=corpus, held_out=0)
    cut, encoded = module._encode_in_order, []

    def interrupted(*arguments):
        for number, pair in enumerate(cut(*arguments)):
            if number == 4:
                raise KeyboardInterrupt
            yield pair

    def counted(*arguments):
        for pair in cut(*arguments):
            encoded.append(pair)
            yield pair

    def attempt(change=lambda: None) -> int:
        """How many pieces are encoded after a preparation was interrupted behind the fourth."""
        monkeypatch.setattr(module, "_encode_in_order", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(job)
        change()
        encoded.clear()
        monkeypatch.setattr(module, "_encode_in_order", counted)
        prepare(job)
        (tmp_path / "out").rename(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
        return len(encoded)

    all_of_them = sum(1 for _ in sources.cut(sources.find_files([source], "*"), "text"))
    assert attempt() == all_of_them - 4
    assert attempt(lambda: os.utime(source, (1, 1))) == all_of_them
    damaged = tmp_path / ".out.progress" / "progress.json"
    assert attempt(lambda: damaged.write_text("[" * 100_000)) == all_of_them
    lost = tmp_path / ".out.partial" / "train.bin"
    assert attempt(lambda: lost.write_bytes(b"")) == all_of_them
