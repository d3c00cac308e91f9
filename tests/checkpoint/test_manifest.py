"""Checkpoint folders: damage is found and named, and nothing else than what should goes."""

import json
from pathlib import Path

import pytest

from pangu.checkpoint import manifest
from pangu.checkpoint.manifest import DamagedCheckpoint, Manifest


def make(checkpoints: Path, step: int) -> Path:
    """A published checkpoint with two files."""
    partial = checkpoints / f".{manifest.name_of(step)}.1.partial"
    (partial / "tokenizer").mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(bytes(range(256)) * 64)
    (partial / "tokenizer" / "vocabulary").write_text(f"written at {step}")
    names = ("__0_0.distcp", "tokenizer/vocabulary")
    files = {name: manifest.record(partial / name) for name in names}
    manifest.write(partial, Manifest(step, {"step": step}, step, 2, files))
    final = checkpoints / manifest.name_of(step)
    manifest.publish(partial, final)
    return final


def test_a_sound_checkpoint_reads_back_as_written(tmp_path):
    folder = make(tmp_path, 20)
    read = manifest.read(folder)
    assert (read.step, read.state, read.optimizer_step, read.world_size) == (
        20,
        {"step": 20},
        20,
        2,
    )
    assert read.files["__0_0.distcp"].size == 256 * 64
    assert manifest.damage(folder, read) == []


def test_every_damage_is_named_and_the_readers_share_the_work(tmp_path):
    folder = make(tmp_path, 20)
    read = manifest.read(folder)
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[5000] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)
    (folder / "tokenizer" / "vocabulary").unlink()
    found = ["__0_0.distcp does not match its checksum", "tokenizer/vocabulary is missing"]
    assert manifest.damage(folder, read) == found
    assert manifest.damage(folder, read, 0, 2) == found[:1]
    assert manifest.damage(folder, read, 1, 2) == found[1:]
    (folder / "__0_0.distcp").write_bytes(data[:100])
    assert manifest.damage(folder, read, 0, 2) == ["__0_0.distcp has 100 of 16384 bytes"]


def test_an_altered_manifest_is_refused(tmp_path):
    file = make(tmp_path, 20) / manifest.MANIFEST
    body = json.loads(file.read_text())
    for text, reason in [
        (json.dumps(body | {"step": 21}), "does not match its own checksum"),
        (file.read_text()[:80], "cannot be read"),
        ("[]", "cannot be read"),
    ]:
        file.write_text(text)
        with pytest.raises(DamagedCheckpoint, match=reason):
            manifest.read(file.parent)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        manifest.read(file.parent)


def steps(checkpoints: Path) -> list[int]:
    return [manifest.step_of(folder) for folder in manifest.complete(checkpoints)]


def test_kept_by_count_and_by_interval(tmp_path):
    for step in (10, 20, 30, 40, 50):
        make(tmp_path, step)
    manifest.prune(tmp_path, 50, keep_last=2, keep_every=20)
    assert steps(tmp_path) == [50, 40, 20]
    manifest.prune(tmp_path, 40, keep_last=1, keep_every=0)
    assert steps(tmp_path) == [50, 40], "a later one, which was passed over, keeps nobody's place"
    manifest.prune(tmp_path, 50, keep_last=0, keep_every=0)
    assert steps(tmp_path) == [50], "the newest is never deleted"


def test_going_back_sets_newer_ones_aside_and_deletes_only_partial_folders(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    (tmp_path / ".step_00000040.7.partial").mkdir()
    assert steps(tmp_path) == [30, 20, 10]
    aside, left = manifest.set_aside_after(tmp_path, 10)
    assert left == []
    manifest.remove_partial(tmp_path)
    assert steps(tmp_path) == [10]
    assert [manifest.read(folder).step for folder in aside] == [30, 20]
    assert not list(tmp_path.glob(".step_*"))
    make(tmp_path, 10)  # of a run that started anew
    assert steps(tmp_path) == [10]
    assert len(list((tmp_path / manifest.SET_ASIDE).iterdir())) == 3


def test_restarts_from_one_step_are_counted_until_there_is_progress(tmp_path):
    assert [manifest.count_restart(tmp_path, step) for step in (10, 10, 10, 20, 20)] == [
        1,
        2,
        3,
        1,
        2,
    ]
    manifest.forget_restarts(tmp_path)
    assert manifest.count_restart(tmp_path, 20) == 1
