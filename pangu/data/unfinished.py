"""A corpus that is being written: a preparation that was killed goes on where its files stand.

    .DIR.partial/PART.bin         tokens
    .DIR.progress/PART.lengths    int32, tokens of each document
    .DIR.progress/digests         16 bytes for each text, where equal ones are left out
    .DIR.progress/progress.json   how long these were when they were last brought to the disk

What is behind those lengths is written again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pangu.data.sources import SourceFile

PARTS = ("train", "validation")
DIGEST_BYTES = 16
_DIGESTS, _PROGRESS = "digests", "progress.json"
_GROWING = (*(f"{part}.{kind}" for part in PARTS for kind in ("bin", "lengths")), _DIGESTS)
_FORMAT = 1


@dataclass
class Progress:
    """How far a preparation has come, of the job with this digest.

    `pieces` are those of the input whose documents are written; `counted` is what the preparation
    itself has counted in them.
    """

    job: str
    pieces: int = 0
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_GROWING, 0))
    counted: dict[str, Any] = field(default_factory=dict)


def digest_of(options: Iterable[object], files: list[SourceFile]) -> str:
    """What tells a preparation from any that would write something else, by the inputs' sizes and
    ages and not by their content."""
    facts: list[object] = [_FORMAT, *map(str, options)]
    for file in files:
        age = file.path.stat().st_mtime_ns
        facts.append([str(file.path.resolve()), file.name, file.size, age])
    return blake2b(json.dumps(facts).encode("utf-8", "surrogateescape")).hexdigest()


class Unfinished:
    """The folder of a corpus that is being written, anew or from where a killed process left it;
    `notes` is the folder that only says how far it is."""

    def __init__(self, folder: Path, notes: Path, job: str) -> None:
        self.folder, self._notes = folder, notes
        found = _read(notes / _PROGRESS)
        self.goes_on = found is not None and found.job == job and self._holds(found)
        self.progress = found if found is not None and self.goes_on else Progress(job)
        if not self.goes_on:
            self.remove()
            folder.mkdir()
            notes.mkdir()

    def remove(self) -> None:
        """Give up what is written, or what is left of it when the corpus has its name."""
        shutil.rmtree(self._notes, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return (self.folder if name.endswith(".bin") else self._notes) / name

    def _holds(self, progress: Progress) -> bool:
        """Whether the files are at least as long as they were."""
        try:
            return progress.sizes.keys() == set(_GROWING) and all(
                self._path(name).stat().st_size >= size for name, size in progress.sizes.items()
            )
        except OSError:
            return False

    def open(self, vocab_size: int) -> None:
        """Open the growing files, cut to what is known to be written."""
        # Imported here: torch takes seconds, and mistakes in the input are found without it.
        from megatron.core.datasets.indexed_dataset import DType

        self._dtype = DType.optimal_dtype(vocab_size)
        self._files = {name: self._path(name).open("ab") for name in _GROWING}
        for name, file in self._files.items():
            file.truncate(self.progress.sizes[name])

    def digests(self) -> set[bytes]:
        """Of the texts that are written."""
        size = self.progress.sizes[_DIGESTS]
        held = self._path(_DIGESTS).read_bytes()[:size] if size else b""
        return {held[i : i + DIGEST_BYTES] for i in range(0, size, DIGEST_BYTES)}

    def add(
        self, part: str, tokens: np.ndarray, lengths: np.ndarray, digests: Iterable[bytes] = ()
    ) -> None:
        """Append documents: `tokens` `[sum(lengths)]`, int32."""
        self._files[f"{part}.bin"].write(tokens.astype(self._dtype).tobytes())
        self._files[f"{part}.lengths"].write(lengths.astype(np.int32).tobytes())
        self._files[_DIGESTS].write(b"".join(digests))

    def commit(self, pieces: int, counted: dict[str, Any]) -> None:
        """Bring all that was added to the disk, and take note of it."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.progress.sizes = {
            name: os.fstat(file.fileno()).st_size for name, file in self._files.items()
        }
        self.progress.pieces, self.progress.counted = pieces, counted
        path = self._path(_PROGRESS)
        partial = path.with_suffix(".partial")
        with partial.open("w") as new:
            new.write(json.dumps(asdict(self.progress)))
            new.flush()
            os.fsync(new.fileno())
        partial.replace(path)

    def finish(self, pieces: int, counted: dict[str, Any]) -> None:
        """Write the indexes; a part without documents has no file."""
        from megatron.core.datasets.indexed_dataset import _IndexWriter

        self.commit(pieces, counted)
        for file in self._files.values():
            file.close()
        for part in PARTS:
            lengths = np.fromfile(self._path(f"{part}.lengths"), np.int32)
            if lengths.size:
                with _IndexWriter(str(self.folder / f"{part}.idx"), self._dtype) as index:
                    index.write(lengths, None, np.arange(lengths.size + 1))
            else:
                (self.folder / f"{part}.bin").unlink()


def _read(path: Path) -> Progress | None:
    try:
        return TypeAdapter(Progress).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
