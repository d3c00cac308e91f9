"""The files of a configured corpus, and those that are not there.

No torch here: `pangu.train` asks before it starts a process, `pangu.doctor` at any time.
"""

from __future__ import annotations

from pathlib import Path

from configs.schema import Config, DataConfig
from configs.violation import Violation
from pangu.data import DataError
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
    return blend, {p: w for p, w in beside.items() if Path(f"{p}.idx").is_file()}


def missing(config: Config) -> list[Violation]:
    """One violation per file that `data=indexed` names, or needs, and that is not there."""
    if config.data.name != "indexed" or not config.data.blend:
        return []
    blend, validation = blends(config.data)
    found = []
    for key, prefixes in (("data.blend", blend), ("data.validation_blend", validation)):
        for prefix in prefixes:
            for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
                if not path.is_file():
                    reason = f"there is no file {path}"
                    found.append(Violation(key, prefix, reason, _instead_of(prefix)))
    beside = Path(next(iter(blend))).parent
    # Beside a corpus that is not there, there is no tokenizer either.
    if config.data.tokenizer or not found:
        tokenizer = config.data.tokenizer or str(beside)
        try:
            locate_tokenizer(tokenizer)
        except DataError as error:
            hint = "the tokenizer.json, .model or .tiktoken file that the corpus was written with"
            found.append(Violation("data.tokenizer", tokenizer, str(error), hint))
    return found


def _part(prefix: str, part: str) -> str:
    return str(Path(prefix) / part) if Path(prefix).is_dir() else prefix


def _instead_of(prefix: str) -> str:
    path = Path(prefix)
    if path.suffix in (".bin", ".idx") and path.is_file():
        return f"without {path.suffix}: {path.with_suffix('')}"
    return "a folder that python -m pangu.data.prepare wrote, or PREFIX of PREFIX.bin and .idx"
