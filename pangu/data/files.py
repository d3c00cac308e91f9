"""The files of a configured corpus, and those that are missing or damaged.

No torch here: `pangu.train` asks before it starts a process, `pangu.doctor` at any time.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from configs.schema import Config, DataConfig
from configs.violation import Violation
from pangu.data import DataError
from pangu.data.checksums import CHEAP_BYTES, expected_digest, verify
from pangu.data.index_file import read_structure
from pangu.data.stdlib import standard_library_folder
from pangu.data.tokenizer import locate_tokenizer

Blend = dict[str, float]


def blends(data: DataConfig) -> tuple[Blend, Blend]:
    """Weights of the training and validation files of `data=indexed`, by prefix.

    A corpus folder stands for the files in it; without a `validation_blend`, the held-out parts
    beside the training parts are blended alike.
    """
    blend = {_part(prefix, "train"): weight for prefix, weight in data.blend.items()}
    if data.validation_blend:
        return blend, {_part(p, "validation"): w for p, w in data.validation_blend.items()}
    beside = {str(Path(p).with_name("validation")): w for p, w in blend.items()}
    return blend, {p: w for p, w in beside.items() if os.path.isfile(f"{p}.idx")}


def faults(config: Config, *, just_read: bool = False) -> list[Violation]:
    """One violation per file of the corpus that is missing, damaged or does not fit the model.

    Content is read as `data.verify` says; with `just_read`, by the process that started this one.
    """
    data = config.data
    if data.name == "stdlib":
        folder = standard_library_folder(data.cache_dir, config.model.vocab_size)
        parts = [str(folder / part) for part in ("train", "validation")]
        hint = f"remove {folder}: it is prepared again"
        return (
            _damaged(config, "data.name", parts, just_read, hint) if os.path.isdir(folder) else []
        )
    if data.name != "indexed" or not data.blend:
        return []
    blend, validation = blends(data)
    found = []
    for key, prefixes in (("data.blend", blend), ("data.validation_blend", validation)):
        there = []
        for prefix in prefixes:
            absent = [
                p for p in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")) if not os.path.isfile(p)
            ]
            for path in absent:
                reason = f"there is no file {path}"
                found.append(Violation(key, prefix, reason, _instead_of(prefix)))
            if not absent:
                there.append(prefix)
        found += _damaged(config, key, there, just_read, "another copy, or prepare it again")
    beside = Path(next(iter(blend))).parent
    # Beside a corpus that is not there, there is no tokenizer either.
    if data.tokenizer or not found:
        tokenizer = data.tokenizer or str(beside)
        try:
            locate_tokenizer(tokenizer)
        except (DataError, OSError) as error:
            hint = "the tokenizer.json, .model or .tiktoken file that the corpus was written with"
            found.append(Violation("data.tokenizer", tokenizer, str(error), hint))
    return found


def check_range(prefix: str, smallest: int, largest: int, vocab_size: int) -> None:
    """Raise a DataError for tokens of `prefix.bin` that the model does not have."""
    if smallest < 0:
        raise DataError(f"{prefix}.bin holds token {smallest}: it is damaged")
    if largest >= vocab_size:
        raise DataError(
            f"{prefix}.bin holds token {largest}, but model.vocab_size is {vocab_size}: "
            "it was written with another tokenizer, or is damaged"
        )


def _damaged(
    config: Config, key: str, prefixes: list[str], just_read: bool, hint: str
) -> list[Violation]:
    asked = time.time() if config.data.verify and not just_read else 0.0
    found = []
    for prefix in prefixes:
        try:
            _check(config, prefix, asked)
        except (DataError, OSError) as error:
            found.append(Violation(key, prefix, str(error), hint))
    return found


def _check(config: Config, prefix: str, not_before: float) -> None:
    """Raise a DataError where the files of `prefix` are damaged: their structure always, their
    content if asked, or if it is cheap and was not read before."""
    structure = read_structure(prefix)
    wanted = config.data.verify
    if wanted is False:
        return
    memory = Path(config.data.cache_dir) / "verified"
    for suffix, tokens in ((".idx", None), (".bin", structure)):
        path = Path(f"{prefix}{suffix}")
        digest = expected_digest(path)
        if not (digest or tokens) or not (wanted or path.stat().st_size <= CHEAP_BYTES):
            continue
        content = verify(path, digest, tokens, memory, not_before)
        check_range(prefix, content.smallest, content.largest, config.model.vocab_size)


def _part(prefix: str, part: str) -> str:
    return str(Path(prefix) / part) if os.path.isdir(prefix) else prefix


def _instead_of(prefix: str) -> str:
    path = Path(prefix)
    if path.suffix in (".bin", ".idx") and os.path.isfile(path):
        return f"without {path.suffix}: {path.with_suffix('')}"
    return "a folder that python -m pangu.data.prepare wrote, or PREFIX of PREFIX.bin and .idx"
