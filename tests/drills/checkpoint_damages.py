"""What is done to a run's folder, and what a run that goes on there must make of it.

The run has checkpoints of steps 2, 4 and 6. Where nothing else is said the newest is damaged, and
the run must go on from the one before and name it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pangu.checkpoint import manifest
from tests.checkpoint.hostile import HOSTILE, reseal

NEWEST, BEFORE, ANEW, REFUSED = "from 6", "from 4", "from 0", "refused"
STEP = "step_00000006"
CODE = "executed"  # the file that hostile code makes in the run folder
_DATA, _METRICS, _LOCK = "__0_0.distcp", "metrics.jsonl", ".run.lock"
_FILES = (".metadata", _DATA, "common.pt", "config.yaml", manifest.MANIFEST, "metadata.json")
_FILES += ("tokenizer/tokenizer.numbers", "tokenizer/tokenizer_info.json")
Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Damage:
    """What `spoil` does to a run folder; the outcome that is right, and words that must be said."""

    spoil: Spoil
    outcome: str = BEFORE
    says: str = STEP
    overrides: tuple[str, ...] = ()
    unprivileged: bool = False
    forgets: bool = False  # fewer checkpoints are kept than there are


def _newest(run: Path) -> Path:
    return run / "checkpoints" / STEP


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _as_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir(parents=True)


def _as_pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def _as_dangling_link(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("nowhere")


# By what it is called: what is done to one file.
_TO_A_FILE: dict[str, Spoil] = {
    "cut short": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "a bit": _flip,
    "deleted": lambda file: file.unlink(),
    "a folder": _as_folder,
}


def _in(name: str, spoil: Spoil) -> Spoil:
    return lambda run: spoil(run / name)


def _of_checkpoint(name: str, spoil: Spoil) -> Spoil:
    return lambda run: spoil(_newest(run) / name)


def _resealed(spoil: Spoil) -> Spoil:
    """The manifest made to agree with what was done to a checkpoint's folder."""

    def both(run: Path) -> None:
        spoil(_newest(run))
        reseal(_newest(run))

    return both


def _mode(name: str, mode: int) -> Spoil:
    return lambda run: (run / name).chmod(mode)


def _files() -> dict[str, Damage]:
    found = {
        f"{name}: {what}": Damage(_of_checkpoint(name, spoil))
        for name in _FILES
        for what, spoil in _TO_A_FILE.items()
    }
    for name in _FILES:
        mode = _mode(f"checkpoints/{STEP}/{name}", 0)
        found[f"{name}: no permission"] = Damage(mode, unprivileged=True)
    found[f"{_DATA}: a pipe"] = Damage(_of_checkpoint(_DATA, _as_pipe))
    found[f"{manifest.MANIFEST}: a pipe"] = Damage(_of_checkpoint(manifest.MANIFEST, _as_pipe))
    found[f"{_DATA}: a dangling link"] = Damage(_of_checkpoint(_DATA, _as_dangling_link))
    return found


def _broken_inside() -> dict[str, Damage]:
    """The manifest agrees, the content is none."""

    def named(name: str, spoil: Spoil) -> Spoil:
        return _resealed(lambda step: spoil(step / name))

    ways = ("cut short", "emptied", "a bit", "deleted")
    found = {
        f"{name}, sealed: {what}": Damage(named(name, _TO_A_FILE[what]))
        for name in (".metadata", _DATA, "config.yaml")
        for what in ways
    }
    # What a weight was, nobody can tell from the file.
    del found[f"{_DATA}, sealed: a bit"]
    info = "tokenizer/tokenizer_info.json"
    for what in ways[:-1]:
        other = Damage(named(info, _TO_A_FILE[what]), REFUSED, "data.tokenizer")
        found[f"{info}, sealed: {what}"] = other
    gone = Damage(named(info, _TO_A_FILE["deleted"]), NEWEST, "has no tokenizer")
    found[f"{info}, sealed: deleted"] = gone
    unread = Damage(named("common.pt", _TO_A_FILE["emptied"]), NEWEST, "")
    found["common.pt, sealed: emptied"] = unread
    return found


def _hostile() -> dict[str, Damage]:
    def by(spoil: Callable[[Path, Path], None]) -> Spoil:
        return lambda run: _resealed(lambda step: spoil(step, run / CODE))(run)

    found = {f"code in {name}": Damage(by(spoil)) for name, spoil in HOSTILE.items()}
    for name in ("common.pt", "the tokenizer"):  # a run that trains opens neither
        found[f"code in {name}"] = Damage(by(HOSTILE[name]), NEWEST, "")
    right = {"tokenizer_info.json": "data.tokenizer", "an object for a tensor": "is missing"}
    for name, says in right.items():
        found[f"code in {name}"] = Damage(by(HOSTILE[name]), REFUSED, says)
    return found


def _body(edit: Callable[[dict[str, Any]], Any], seal: bool = True) -> Spoil:
    def write(run: Path) -> None:
        file = _newest(run) / manifest.MANIFEST
        body = json.loads(file.read_text())
        del body["crc32"]
        body = edit(body) or body
        if seal:
            body["crc32"] = manifest._crc(body)
        file.write_text(json.dumps(body))

    return write


def _text(name: str, content: str | bytes) -> Spoil:
    content = content.encode() if isinstance(content, str) else content

    def write(run: Path) -> None:
        (run / name).write_bytes(content)

    return write


def _manifests() -> dict[str, Damage]:
    name = f"checkpoints/{STEP}/{manifest.MANIFEST}"

    def of(**values: Any) -> Spoil:
        return _body(lambda body: body.update(values))

    def state(**values: Any) -> Spoil:
        return _body(lambda body: body["state"].update(values))

    def without_shard(run: Path) -> None:
        _body(lambda body: body["files"].pop(_DATA) and None)(run)
        (_newest(run) / _DATA).unlink()

    spoils = {
        "nested 100,000 deep": _text(name, "[" * 100_000),
        "not UTF-8": _text(name, b"\xff\xfe{}"),
        "a list": _text(name, "[]"),
        "a number of 10,000 digits": _text(name, "9" * 10_000),
        "no seal": _body(lambda body: None, seal=False),
        "a step that is none": of(step=-1),
        "a step beyond all": of(step=10**40),
        "files in no list": of(files=None),
        "a file of another folder": of(files={"../step_00000004/config.yaml": [1, 1]}),
        "an absolute file": of(files={"/etc/passwd": [1, 1]}),
        "another step in the state": state(step=4),
        "a foreign key in the state": state(colour=3),
        "a fraction in the state": state(skipped_steps=0.5),
        "sequences beyond all": state(consumed_sequences=10**40),
        "an optimizer's step beyond all": of(optimizer_step=10**40),
        "without the shard": without_shard,
    }
    found = {f"manifest: {what}": Damage(spoil) for what, spoil in spoils.items()}
    found["manifest: of another step"] = Damage(of(step=4, state={"step": 4}))
    return found


def _copied(to: str) -> Spoil:
    def copy(run: Path) -> None:
        shutil.copytree(_newest(run), run / "checkpoints" / to)

    return copy


def _neighbours() -> dict[str, Damage]:
    """What else lies beside checkpoints: none of it is read, moved or deleted."""
    beside = "checkpoints/"

    def link(run: Path) -> None:
        (run / beside / "step_00000008").symlink_to(STEP)

    def foreign(run: Path) -> None:
        (run / beside / "notes.txt").write_text("mine")
        (run / beside / os.fsdecode(b"step_\xff")).mkdir()
        (_newest(run) / "notes.txt").write_text("mine")

    alone = {name: _copied(name) for name in (f"{STEP}.bak", "step_abc", "step_6", "best")}
    alone["step_99999999999999999999"] = _copied("step_99999999999999999999")
    alone["a file step_00000008"] = _text(beside + "step_00000008", "x")
    alone["a dangling link"] = _in(beside + "step_00000008", _as_dangling_link)
    alone["foreign files"] = foreign
    alone["half a checkpoint"] = _copied(f".{STEP}.1.partial")
    found = {f"beside: {what}": Damage(spoil, NEWEST, "") for what, spoil in alone.items()}
    for name in ("step_00000009", "step_00000005"):
        found[f"beside: a copy named {name}"] = Damage(_copied(name), NEWEST, name)
    found["beside: a link of a later step"] = Damage(link, NEWEST, "step_00000008")
    empty = _in(beside + "step_00000008", _as_folder)
    found["beside: an empty step_00000008"] = Damage(empty, NEWEST, "step_00000008")
    return found


def _all_checkpoints(spoil: Spoil) -> Spoil:
    def each(run: Path) -> None:
        for step in (run / "checkpoints").glob("step_*"):
            spoil(step)

    return each


def _folders() -> dict[str, Damage]:
    """The folders of a run, and who may do what in them."""

    def gone(run: Path) -> None:
        shutil.rmtree(run / "checkpoints")

    def as_file(run: Path) -> None:
        gone(run)
        (run / "checkpoints").write_text("x")

    def moved(run: Path) -> None:
        (run / "checkpoints").rename(run / "elsewhere")
        (run / "checkpoints").symlink_to("elsewhere")

    def shelf(run: Path, make: Spoil) -> None:
        _flip(_newest(run) / _DATA)
        make(run / "checkpoints" / "set_aside")

    def closed_shelf(run: Path) -> None:
        shelf(run, lambda folder: folder.mkdir(mode=0o555))

    every = _all_checkpoints(lambda step: _flip(step / _DATA))
    damaged = "every checkpoint of"
    stays = "cannot be set aside"
    found = {
        "every checkpoint: a bit": Damage(every, REFUSED, damaged),
        "every checkpoint, asked to start anew": Damage(
            every, ANEW, "set aside", ("checkpoint.resume=never",)
        ),
        "checkpoints: gone": Damage(gone, ANEW, ""),
        "checkpoints: a file": Damage(as_file, REFUSED, "checkpoints"),
        "checkpoints: a link to another folder": Damage(moved, NEWEST, ""),
        "set_aside: a file": Damage(lambda run: shelf(run, Path.touch), BEFORE, stays),
        "set_aside: no permission": Damage(closed_shelf, BEFORE, stays, unprivileged=True),
        "set_aside: no permission, one kept": Damage(
            closed_shelf,
            BEFORE,
            stays,
            ("checkpoint.keep_last=1", "checkpoint.save_every=1", "train.steps=5"),
            unprivileged=True,
            forgets=True,
        ),
    }
    for what, mode in (("nothing", 0), ("reading", 0o444), ("no writing", 0o555)):
        for name in ("checkpoints", "."):
            said = "checkpoints" if name != "." else "cannot be"
            damage = Damage(_mode(name, mode), REFUSED, said, unprivileged=True)
            found[f"{'run_dir' if name == '.' else name}: {what}"] = damage
    nothing = _mode(f"checkpoints/{STEP}", 0)
    found["the newest: nothing"] = Damage(nothing, BEFORE, STEP, unprivileged=True)
    return found


def _rows() -> dict[str, Damage]:
    """Beside the checkpoints: metrics, lock, and the other files of a run."""
    row = '{"step": 3, "loss": 1.0}\n'
    spoils: dict[str, tuple[Spoil, str, str]] = {
        "metrics: a folder": (_in(_METRICS, _as_folder), REFUSED, _METRICS),
        "metrics: a pipe": (_in(_METRICS, _as_pipe), REFUSED, _METRICS),
        "metrics: deleted": (_in(_METRICS, _TO_A_FILE["deleted"]), NEWEST, ""),
        "metrics: emptied": (_in(_METRICS, _TO_A_FILE["emptied"]), NEWEST, ""),
        "metrics: binary": (_text(_METRICS, bytes(range(256)) * 9), NEWEST, _METRICS),
        "metrics: a bit": (_in(_METRICS, _flip), NEWEST, ""),
    }
    odd = {
        "without a step": '{"loss": 1.0}\n' + row,
        "a list": "[1]\n" + row,
        "deep": "[" * 100_000 + "\n" + row,
        "a word for a step": '{"step": "x"}\n' + row,
        "a step beyond all": '{"step": 1' + "0" * 400 + "}\n" + row,
    }
    for what, text in odd.items():
        spoils[f"metrics: {what}"] = _text(_METRICS, text), NEWEST, _METRICS
    spoils["metrics: a last line cut short"] = _text(_METRICS, row + '{"st'), NEWEST, ""
    foreign = '{"host": "elsewhere", "pid": 1}'
    for what, content in (("binary", b"\xff\0"), ("deep", b"[" * 100_000), ("words", b"mine")):
        spoils[f"lock: {what}"] = _text(_LOCK, content), NEWEST, ""
    spoils["lock: other fields"] = _text(_LOCK, foreign), NEWEST, ""
    spoils["lock: a folder"] = _in(_LOCK, _as_folder), REFUSED, _LOCK
    spoils["lock: a pipe"] = _in(_LOCK, _as_pipe), NEWEST, ""  # which can be locked as well
    counts = "checkpoints/restarts.json"
    spoils["restarts: deep"] = _text(counts, "[" * 100_000), NEWEST, ""
    spoils["restarts: words"] = _text(counts, '{"step": "x"}'), NEWEST, ""
    spoils["restarts: a folder"] = _in(counts, _as_folder), REFUSED, "restarts"
    for name in ("config.yaml", "tokenizer/tokenizer_info.json", "tokenizer", "logs"):
        spoils[f"{name}: unlike it"] = _in(name, _unlike), REFUSED, name
    for name in ("expert_load.json", "loss.png", "report.html", "sample.txt", "tensorboard"):
        right = (REFUSED if name == "tensorboard" else NEWEST, name)
        spoils[f"{name}: unlike it"] = _in(name, _unlike), *right
    found = {what: Damage(spoil, *right) for what, (spoil, *right) in spoils.items()}
    mode = _mode(_METRICS, 0)
    found["metrics: no permission"] = Damage(mode, REFUSED, _METRICS, unprivileged=True)
    found["lock: no permission"] = Damage(_mode(_LOCK, 0), REFUSED, _LOCK, unprivileged=True)
    return found


def _unlike(path: Path) -> None:
    """A folder for a file, and the other way round."""
    if path.is_dir() or path.name == "logs":
        shutil.rmtree(path, ignore_errors=True)
        path.write_text("x")
    else:
        _as_folder(path)
        (path / "inside").write_text("x")


DAMAGES: dict[str, Damage] = (
    _files() | _broken_inside() | _hostile() | _manifests() | _neighbours() | _folders() | _rows()
)
