"""Checkpoints that a stranger has spoilt: code where data should be, and a manifest that agrees."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from pangu.checkpoint import manifest


class Hostile:
    """Makes the file `marker` in whatever process unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def reseal(step: Path) -> None:
    """Make the manifest agree with the files, as anybody can."""
    old = manifest.read(step)
    files = {
        path.relative_to(step).as_posix(): manifest.record(path)
        for path in step.rglob("*")
        if path.is_file() and path.name != manifest.MANIFEST
    }
    manifest.write(
        step,
        manifest.Manifest(old.step, old.state, old.optimizer_step, old.world_size, files),
    )


def edit_metadata(step: Path, edit: Callable[[Any], Any]) -> None:
    """Rewrite `.metadata`; what `edit` returns, if anything, takes its place."""
    file = step / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(edit(metadata) or metadata))


def replace_entry(step: Path, index: MetadataIndex, content: bytes) -> None:
    """Let an entry of `.metadata` be `content`, put behind the end of its file."""

    def move(metadata: Any) -> None:
        place = metadata.storage_data[index]
        file = step / place.relative_path
        place.offset, place.length = file.stat().st_size, len(content)
        with file.open("ab") as out:
            out.write(content)

    edit_metadata(step, move)


def saved(value: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


RANDOM = MetadataIndex("random_state/shard_0_1")
EMBEDDING = MetadataIndex("embedding.word_embeddings.weight", [0, 0])


def _in_metadata(step: Path, marker: Path) -> None:
    (step / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))


def _inside_metadata(step: Path, marker: Path) -> None:
    edit_metadata(step, lambda m: setattr(m, "planner_data", {"x": [Hostile(marker)]}))


def _as_dtype(step: Path, marker: Path) -> None:
    def edit(metadata: Any) -> None:
        metadata.state_dict_metadata[EMBEDDING.fqn].properties.dtype = Hostile(marker)

    edit_metadata(step, edit)


def _in_random_states(step: Path, marker: Path) -> None:
    replace_entry(step, RANDOM, saved([{"torch": Hostile(marker)}]))


def _bare_pickle(step: Path, marker: Path) -> None:
    replace_entry(step, RANDOM, pickle.dumps([Hostile(marker)]))


def _in_shard(step: Path, marker: Path) -> None:
    replace_entry(step, EMBEDDING, saved(Hostile(marker)))


def _object_for_tensor(step: Path, marker: Path) -> None:
    """The tensor's name stands for an object, which the engine's planner would unpickle."""
    content = saved(Hostile(marker))

    def edit(metadata: Any) -> None:
        place = metadata.storage_data.pop(EMBEDDING)
        file = step / place.relative_path
        place.offset, place.length = file.stat().st_size, len(content)
        metadata.storage_data[MetadataIndex(EMBEDDING.fqn)] = place
        objects = metadata.state_dict_metadata
        objects[EMBEDDING.fqn] = objects[RANDOM.fqn]
        with file.open("ab") as out:
            out.write(content)

    edit_metadata(step, edit)


def _common(step: Path, marker: Path) -> None:
    torch.save(Hostile(marker), step / "common.pt")


def _tokenizer_info(step: Path, marker: Path) -> None:
    (step / "tokenizer" / "tokenizer_info.json").write_bytes(pickle.dumps(Hostile(marker)))


def _tokenizer(step: Path, marker: Path) -> None:
    (step / "tokenizer" / "tokenizer.numbers").write_bytes(pickle.dumps(Hostile(marker)))


def _config(step: Path, marker: Path) -> None:
    line = f'seed: !!python/object/apply:builtins.open ["{marker}", "w"]\n'
    (step / "config.yaml").write_text(line)


# By where the code is: how it gets there, and whether the checkpoint is of any use then.
HOSTILE: dict[str, Callable[[Path, Path], None]] = {
    ".metadata": _in_metadata,
    "inside .metadata": _inside_metadata,
    "a dtype": _as_dtype,
    "random states": _in_random_states,
    "bare random states": _bare_pickle,
    "a tensor": _in_shard,
    "an object for a tensor": _object_for_tensor,
    "common.pt": _common,
    "tokenizer_info.json": _tokenizer_info,
    "the tokenizer": _tokenizer,
    "config.yaml": _config,
}
