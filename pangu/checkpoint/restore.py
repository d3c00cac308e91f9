"""Which checkpoint a run starts from, and loading it.

`checkpoint.resume` is auto (the newest sound checkpoint of the run folder), never, or a folder: of
another run, or of one checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from configs.change_rules import begins_stage, changes, refused
from configs.compose import read_file
from configs.schema import Config
from configs.violation import ConfigError, Violation
from pangu.checkpoint import contents, manifest, model_files
from pangu.checkpoint.contents import CheckpointMismatch
from pangu.checkpoint.manifest import DamagedCheckpoint, Manifest
from pangu.checkpoint.run_state import RunState
from pangu.checkpoint.tensor_files import WeightsError
from pangu.checkpoint.tensor_rows import TensorRows
from pangu.data.tokenizer import INFO_FILE, Tokenizer
from pangu.engines import state_parts
from pangu.engines.contract import Engine
from pangu.engines.ranks import from_rank_0, say

CONFIG = "config.yaml"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"


def checkpoints_of(config: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.run_dir) / CHECKPOINTS


def read_config(path: str | Path) -> Config:
    """The resolved configuration that a checkpoint was trained with.

    Raises:
        ConfigError: there is no checkpoint, or its configuration cannot be read.
    """
    file = Path(path) / CONFIG
    if not file.is_file():
        reason = "is no checkpoint folder: it has no " + CONFIG
        raise ConfigError([Violation("checkpoint", path, reason, "run_dir/checkpoints/step_…")])
    return read_file(file, "checkpoint")


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files are all as they were written.

    `run_dir` is the run whose newest sound one it is; "" for one that was named.
    """

    path: Path
    manifest: Manifest
    run_dir: str = ""

    @property
    def state(self) -> RunState:
        """The run's state when it was saved."""
        return RunState(**self.manifest.state)


def load_model(source: str | Path | Found, chunks: list[Any]) -> Path:
    """Weights alone, of a checkpoint folder or of one that was found to be sound, into chunks built
    for any layout and precision. Collective.

    Returns:
        The checkpoint that they came from: where the files of a run's newest are as written and
        hold no tensors all the same, one before it.

    Raises:
        ConfigError: a file is missing or altered, or the checkpoint holds other weights than the
            model has.
    """
    found = source if isinstance(source, Found) else _verify(Path(source))
    if isinstance(found, str):
        raise ConfigError([Violation("checkpoint", source, f"is no sound checkpoint: {found}")])
    return _load(found, lambda found: contents.load(found.path, chunks, None), "checkpoint").path


def unread(folder: Path) -> tuple[Path, TensorRows]:
    """A model's folder, a checkpoint or a run's newest one, of which nothing is read but what is
    asked for: files have the sizes that they should have, their checksums are not compared.

    Raises:
        WeightsError: there is none, or a file is missing or cut short.
    """
    if not (folder / manifest.MANIFEST).is_file():
        complete = manifest.complete(folder / CHECKPOINTS)
        if not complete:
            raise WeightsError(f"{folder} is no folder of a model and no run with a checkpoint")
        folder = complete[0]
    try:
        wrong = manifest.cut_short(folder, manifest.read(folder))
    except DamagedCheckpoint as error:
        wrong = [str(error)]
    if wrong:
        raise WeightsError(f"{folder} is no sound checkpoint: {'; '.join(wrong)}")
    return folder, TensorRows(folder)


def _load(found: Found, fill: Callable[[Found], None], key: str) -> Found:
    """Fill something from a checkpoint; from the one before it, of the same run, where it is
    damaged in a way that its checksums do not show. Collective.

    Raises:
        ConfigError: there is none before it, or it holds other tensors than are needed.
    """
    while True:
        try:
            fill(found)
            return found
        except CheckpointMismatch as error:
            raise ConfigError([Violation(key, found.path, str(error))]) from None
        except DamagedCheckpoint as error:
            before = _before(found, str(error)) if found.run_dir else None
            if before is None:
                reason = f"is no sound checkpoint: {error}"
                raise ConfigError([Violation(key, found.path, reason)]) from None
            found = before


def _before(found: Found, reason: str) -> Found | None:
    say(f"checkpoint {found.path} is damaged: {reason}; trying the one before it")
    return newest(found.run_dir, before=found.manifest.step)


def find(config: Config) -> Found | None:
    """The checkpoint that `checkpoint.resume` asks for; None where the run starts anew.

    Collective. `auto` takes the newest sound one of the run folder and reports damaged ones.

    Raises:
        ConfigError: the named checkpoint is missing or damaged, all checkpoints of the run folder
            are damaged, the model has changed, or the run has started too often from
            there without getting further.
    """
    resume = config.checkpoint.resume
    if resume == "never":
        return None
    found = newest(config.run_dir) if resume == "auto" else _named(Path(resume))
    if found is not None:
        refuse_other_model(config, found.path)
        if resume == "auto":
            _bound_restarts(config, found)
    return found


def newest(run_dir: str, before: int | None = None) -> Found | None:
    """The newest sound checkpoint of a run folder, of a step less than `before`. Collective.

    Raises:
        ConfigError: there are checkpoints, but all are damaged; or their folder cannot be read.
    """
    checkpoints = Path(run_dir) / CHECKPOINTS

    def look() -> tuple[list[Path], dict[Path, int]]:
        return manifest.complete(checkpoints), manifest.misnamed(checkpoints)

    try:
        folders, copies = from_rank_0(look)
    except OSError as error:
        reason = f"{checkpoints} cannot be read: {error.strerror}"
        raise ConfigError([Violation("checkpoint.resume", run_dir, reason)]) from None
    if before is None:
        for folder, step in copies.items():
            say(f"checkpoint {folder} is left alone: by its manifest it is of step {step}")
    damaged = []
    for folder in folders:
        if before is not None and manifest.step_of(folder) >= before:
            continue
        found = _verify(folder)
        if not isinstance(found, str):
            return replace(found, run_dir=run_dir)
        damaged.append(f"{folder.name} ({found})")
        say(f"checkpoint {folder} is damaged: {found}; trying the one before it")
    if damaged:
        reason = f"every checkpoint of {run_dir} is damaged: {', '.join(damaged)}"
        hint = "checkpoint.resume=never to start anew (they are set aside, not deleted)"
        raise ConfigError([Violation("checkpoint.resume", "auto", reason, hint)])
    return None


def _named(path: Path) -> Found:
    def is_run_folder() -> bool:
        try:
            return (path / CHECKPOINTS).is_dir()
        except OSError:  # `_verify` says why it cannot be read
            return False

    if from_rank_0(is_run_folder):  # its newest sound checkpoint
        found: Found | str = newest(str(path)) or "no checkpoint is complete"
    else:
        found = _verify(path)
    if isinstance(found, str):
        hint = "auto, never, a run folder, or one of its checkpoints/step_… folders"
        reason = f"is no sound checkpoint: {found}"
        raise ConfigError([Violation("checkpoint.resume", path, reason, hint)])
    return found


def _verify(folder: Path) -> Found | str:
    """The checkpoint, or what is wrong with it. The ranks share the reading of the files."""

    def read() -> Manifest | str:
        try:
            found = manifest.read(folder)
        except DamagedCheckpoint as error:
            return str(error)
        known = {field.name for field in fields(RunState)}
        if found.state.keys() - known or found.state.get("step") != found.step:
            return f"{manifest.MANIFEST} describes no state of a run"
        if (step := manifest.other_step(folder)) is not None:
            return f"its manifest says step {step}: it is a copy under another name"
        return found

    found = from_rank_0(read)
    if isinstance(found, str):
        return found
    size = dist.get_world_size()
    wrong: list[list[str]] = [[] for _ in range(size)]
    dist.all_gather_object(wrong, manifest.damage(folder, found, dist.get_rank(), size))
    damaged = [line for lines in wrong for line in lines]
    damaged = damaged or from_rank_0(lambda: _unreadable_config(folder))
    return "; ".join(damaged) if damaged else Found(folder, found)


def _unreadable_config(folder: Path) -> list[str]:
    try:
        read_config(folder)
    except ConfigError as error:
        return [violation.reason for violation in error.violations]
    return []


def refuse_other_model(config: Config, path: Path) -> None:
    """Compare the model with the one in the checkpoint.

    Raises:
        ConfigError: naming every key that changes which weights there are, and every key that
            changes what the model makes of them and is not in `checkpoint.allow_changes`.
    """
    found = changes(read_config(path), config)
    if violations := refused(found, config.checkpoint.allow_changes, str(path)):
        raise ConfigError(violations)


def refuse_other_tokenizer(config: Config, found: Found, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer of the data with the checkpoint's, by their content. Collective.

    Raises:
        ConfigError: they differ, and `checkpoint.allow_changes` does not name data.tokenizer.
    """
    key = "data.tokenizer"

    saved = found.path / TOKENIZER / INFO_FILE

    def differ() -> bool:
        if not saved.is_file():
            say(f"warning: {found.path} has no tokenizer to compare with that of the data")
            return False
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            return saved.read_bytes() != (Path(folder) / INFO_FILE).read_bytes()

    if key not in config.checkpoint.allow_changes and from_rank_0(differ):
        reason = (
            f"is not the tokenizer that {found.path} was trained with: the same numbers would "
            "stand for other text"
        )
        hint = f"data written with {found.path / TOKENIZER}; or checkpoint.allow_changes=[{key}]"
        raise ConfigError([Violation(key, config.data.tokenizer, reason, hint)])


def describe_changes(config: Config, found: Found) -> str:
    """One line about what goes on otherwise than the checkpoint was trained; "" for nothing."""
    return ", ".join(map(str, changes(read_config(found.path), config)))


def describe_codes(config: Config, found: Found) -> str:
    """One line about what training makes of a quantised model's codes; "" where it has none."""
    if not (scheme := model_files.scheme(found.path)):
        return ""
    if config.model.lora_rank or config.train.leap_heads_only:
        then = (
            "its weights keep the values of their codes, what is beside them is trained in floats"
        )
    else:
        then = (
            "its weights are trained on as floats, from the values of their codes, and the run's "
            "checkpoints have codes no more: quantise the result anew, or train model.lora_rank"
        )
    return f"{found.path} is quantised ({scheme}): {then}"


def _bound_restarts(config: Config, found: Found) -> None:
    limit, step = config.checkpoint.max_restarts, found.manifest.step
    count = from_rank_0(lambda: manifest.count_restart(checkpoints_of(config), step))
    if count > limit:
        reason = (
            f"the run has started {count - 1} times from {found.path} without reaching another "
            "checkpoint: starting again would repeat whatever ends it"
        )
        hint = f"checkpoint.resume=PATH of another checkpoint, or more than {limit}"
        raise ConfigError([Violation("checkpoint.max_restarts", limit, reason, hint)])


def restore(config: Config, found: Found, engine: Engine) -> Found:
    """Fill the model and the optimizer, and return the checkpoint that they were filled from: the
    one before, where the files of a run's newest are as written and hold no tensors all the same.
    Collective.

    Random states are restored only in the layout that wrote them: in another one there is no
    telling which rank's they would be.

    Raises:
        ConfigError: naming every tensor that is missing or extra, or the damage.
    """
    everything = engine.state_parts()
    state_parts.initialize(everything)

    anew = begins_stage(read_config(found.path), config)

    def fill(source: Found) -> None:
        with engine.whole_weights(changing=True):
            contents.load(source.path, engine.chunks, everything, moments=not anew)
        saved = read_config(source.path)
        same_size = source.manifest.world_size == dist.get_world_size()
        if same_size and saved.parallel == config.parallel:
            contents.load_random_states(source.path)

    loaded = _load(found, fill, "checkpoint.resume")
    state_parts.set_optimizer_step(everything, 0 if anew else loaded.manifest.optimizer_step)
    return loaded
