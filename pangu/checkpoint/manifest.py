"""Checkpoint folders on disk: which are complete, which are damaged, which may go.

    <run_dir>/checkpoints/step_00000200/     complete; manifest.json lists every file
    <run_dir>/checkpoints/.step_….partial/   being written, or left behind by a killed run
    <run_dir>/checkpoints/set_aside/         newer than the step that a run went back to, or damaged

Only such names count, and only where the manifest does not name another step: copies, and whatever
else is kept there, are neither read nor moved nor deleted.

A folder gets its final name by one rename, when all its files and the manifest are on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pangu import plain_file
from pangu.plain_file import open_plain, read_plain

MANIFEST = "manifest.json"
SET_ASIDE = "set_aside"
_FORMAT = 1
_RESTARTS = "restarts.json"
_NAME = re.compile(r"step_[0-9]{8,18}")


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be trusted; the message says what is wrong with which file."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC-32 of a file."""

    size: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: the run's state, the ranks that wrote it, and all its files."""

    step: int
    state: dict[str, int]
    optimizer_step: int
    world_size: int
    files: dict[str, FileRecord]


def name_of(step: int) -> str:
    """Folder of the checkpoint of a step."""
    return f"step_{step:08d}"


def record(path: Path) -> FileRecord:
    """Size and checksum of a file, read in pieces.

    Raises:
        OSError: it cannot be read, or is no file (a pipe never ends).
    """
    crc = size = 0
    with open_plain(path) as file:
        while piece := file.read(1 << 24):
            crc = zlib.crc32(piece, crc)
            size += len(piece)
    return FileRecord(size, crc)


def write(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, with a checksum of itself."""
    body = {
        "format": _FORMAT,
        "step": manifest.step,
        "state": manifest.state,
        "optimizer_step": manifest.optimizer_step,
        "world_size": manifest.world_size,
        "files": {name: [r.size, r.crc32] for name, r in sorted(manifest.files.items())},
    }
    (folder / MANIFEST).write_text(json.dumps(body | {"crc32": _crc(body)}, indent=1) + "\n")


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedCheckpoint: it is missing, unreadable or altered.
    """
    try:
        body: dict[str, Any] = json.loads(read_plain(folder / MANIFEST))
        crc = body.pop("crc32")
        matches = crc == _crc(body)
        manifest = Manifest(
            step=_count(body["step"]),
            state={str(name): _count(value) for name, value in body["state"].items()},
            optimizer_step=_count(body["optimizer_step"]),
            world_size=_count(body["world_size"]),
            files={
                _inside(name): FileRecord(_count(size), _count(crc32))
                for name, (size, crc32) in body["files"].items()
            },
        )
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read ({error})") from None
    if not matches:
        raise DamagedCheckpoint(f"{MANIFEST} does not match its own checksum")
    return manifest


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{str(value)[:40]} is no count")
    return value


def _inside(name: str) -> str:
    """The name of a file of the folder itself: a manifest may come from a stranger."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name[:80]} is no file of the folder")
    return name


def _crc(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def damage(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with this reader's share (every `parts`-th) of a checkpoint's files."""
    found = []
    for name in sorted(manifest.files)[part::parts]:
        expected = manifest.files[name]
        try:
            actual = record(folder / name)
        except FileNotFoundError:
            found.append(f"{name} is missing")
            continue
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
            continue
        if actual.size != expected.size:
            found.append(f"{name} has {actual.size} of {expected.size} bytes")
        elif actual != expected:
            found.append(f"{name} does not match its checksum")
    return found


def cut_short(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with a checkpoint's files as far as it shows without reading them."""
    found = []
    for name, expected in sorted(manifest.files.items()):
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
            continue
        if size != expected.size:
            found.append(f"{name} has {size} of {expected.size} bytes")
    return found


def complete(checkpoints: Path) -> list[Path]:
    """Folders with a final name, newest step first, but for those of `misnamed`.

    Raises:
        OSError: the folder is there and cannot be read.
    """
    return [folder for folder in _named(checkpoints) if other_step(folder) is None]


def misnamed(checkpoints: Path) -> dict[Path, int]:
    """Folders with a final name whose manifest, itself whole, is of the step given here: copies."""
    found = {folder: other_step(folder) for folder in _named(checkpoints)}
    return {folder: step for folder, step in found.items() if step is not None}


def other_step(folder: Path) -> int | None:
    """The step in a whole manifest, where the folder's name is that of another one."""
    try:
        step = read(folder).step
    except DamagedCheckpoint:
        return None
    return step if is_name(folder.name) and step_of(folder) != step else None


def is_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint of the run."""
    return bool(_NAME.fullmatch(name)) and name == name_of(int(name.removeprefix("step_")))


def _named(checkpoints: Path) -> list[Path]:
    try:
        with os.scandir(checkpoints) as entries:
            names = [entry.name for entry in entries if is_name(entry.name) and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((checkpoints / name for name in names), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a folder's name."""
    return int(folder.name.removeprefix("step_"))


def publish(partial: Path, final: Path) -> None:
    """Bring a finished folder to the disk and give it its name; what has it is set aside."""
    if os.path.lexists(final):  # what is in the way may be a link to nothing
        set_aside(final)
    plain_file.publish(partial, final)


def set_aside(folder: Path) -> Path:
    """Move a checkpoint where no run will pick it up by itself; nothing is deleted."""
    shelf = folder.parent / SET_ASIDE
    shelf.mkdir(exist_ok=True)
    target = shelf / f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    while target.exists():
        target = target.with_name(target.name + "+")
    folder.rename(target)
    return target


def set_aside_after(checkpoints: Path, step: int) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Set aside every checkpoint of a later step: the run goes on from `step`.

    Returns:
        Those that were moved; and those that could not be, which are damaged, with the reason.

    Raises:
        OSError: a sound one cannot be moved: the next start would go on from there.
    """
    moved, left = [], []
    for folder in complete(checkpoints):
        if step_of(folder) <= step:
            continue
        try:
            moved.append(set_aside(folder))
        except OSError as error:
            if not _is_damaged(folder):
                raise
            left.append((folder, str(error.strerror)))
    return moved, left


def _is_damaged(folder: Path) -> bool:
    try:
        return bool(damage(folder, read(folder)))
    except DamagedCheckpoint:
        return True


def remove_partial(checkpoints: Path) -> None:
    """Delete what killed runs left half written."""
    for folder in checkpoints.glob(".step_*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def prune(checkpoints: Path, saved: int, keep_last: int, keep_every: int) -> None:
    """After step `saved`: delete all but the newest `keep_last` and, unless 0, every multiple of
    `keep_every`. What is later than `saved` is damaged and could not be set aside: it does not
    count."""
    written = [folder for folder in complete(checkpoints) if step_of(folder) <= saved]
    for folder in written[max(1, keep_last) :]:
        if not (keep_every and step_of(folder) % keep_every == 0):
            with contextlib.suppress(OSError):  # not ours to delete, it seems
                # The manifest first: a deletion cut short leaves nothing that looks complete.
                (folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


def count_restart(checkpoints: Path, step: int) -> int:
    """How often, this time included, runs have started from this step without getting to the
    next checkpoint or to the end."""
    path = checkpoints / _RESTARTS
    try:
        counted = json.loads(path.read_text())
        before = counted["restarts"] if counted["step"] == step else 0
        before = _count(before)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        before = 0
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"step": step, "restarts": before + 1}))
    partial.replace(path)
    return before + 1


def forget_restarts(checkpoints: Path) -> None:
    """The run has made progress."""
    with contextlib.suppress(OSError):
        (checkpoints / _RESTARTS).unlink(missing_ok=True)
