"""Save checkpoints: megatron-core's distributed format, complete or absent.

The engine plans what each rank writes; a forked process then writes, synchronises and checksums
this rank's file from a snapshot while training goes on. When all ranks are done, rank 0 adds the
manifest and gives the folder its name. A save that fails leaves the run and the checkpoints before
it as they were.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import shutil
import signal
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.serialization import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from configs.compose import to_yaml
from configs.schema import Config
from pangu import backends
from pangu.checkpoint import contents, manifest
from pangu.checkpoint.manifest import FileRecord, Manifest
from pangu.checkpoint.restore import CONFIG, TOKENIZER, checkpoints_of
from pangu.checkpoint.run_state import RunState
from pangu.data.tokenizer import Tokenizer
from pangu.engines import state_parts
from pangu.engines.contract import Engine
from pangu.engines.ranks import from_rank_0, say
from pangu.engines.state_parts import Part
from pangu.processes import die_with_parent


@dataclass(frozen=True)
class Saved:
    """How a save ended: `error` is None, or says on which rank it failed and why."""

    step: int
    error: str | None


class Saver:
    """Writes the checkpoints of a run, one at a time. Every method is collective."""

    def __init__(self, config: Config, engine: Engine, tokenizer: Tokenizer) -> None:
        self.config = config
        self.engine = engine
        self.tokenizer = tokenizer
        self.folder = checkpoints_of(config)
        self._writing: _Writing | None = None

    def prepare(self, step: int) -> None:
        """Before the first step of a run that starts at `step`: clear what killed runs left, and
        set aside what is newer.

        Raises:
            OSError: on every rank; a sound newer checkpoint cannot be moved, or there is no room.
        """

        def clear() -> tuple[list[Path], list[tuple[Path, str]]]:
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest.remove_partial(self.folder)
            return manifest.set_aside_after(self.folder, step)

        moved, left = from_rank_0(clear)
        for path in moved:
            say(f"starting from step {step}: {path.name} is set aside in {path.parent}")
        for path, why in left:
            say(f"warning: {path} is damaged and cannot be set aside ({why}): it stays where it is")

    def start(self, state: RunState) -> Saved | None:
        """Begin to save; returns at once, unless the save fails at once."""
        assert self._writing is None, "one save at a time: finish it first"
        partial = self.folder / f".{manifest.name_of(state.step)}.{os.getpid()}.partial"
        made: Path | str = from_rank_0(lambda: _make_folder(partial))
        if isinstance(made, str):
            return Saved(state.step, made)
        everything = self.engine.state_parts()
        state_parts.initialize(everything)
        with self.engine.whole_weights():
            plan = self._plan(everything, made)
        self._writing = _Writing(
            Manifest(
                step=state.step,
                state=asdict(state),
                optimizer_step=state_parts.optimizer_step(everything),
                world_size=dist.get_world_size(),
                files={},
            ),
            made,
            plan,
        )
        return None

    def _plan(self, everything: list[Part], folder: Path) -> _Plan:
        """What this rank writes. What it gathered and leaves to its replicas is given back on
        return, before a process is forked that would keep it until all is written."""
        # That each element is written exactly once is checked below, by the parallel strategy.
        sharded, _ = save_preprocess(
            contents.to_save(self.engine.chunks, everything), validate_access_integrity=False
        )
        plan = _Plan()
        # Spreads what replicas share over the ranks that have it.
        FullyParallelSaveStrategyWrapper(plan, self.engine.replicas()).async_save(sharded, folder)
        return plan

    @property
    def writing(self) -> bool:
        """Whether a save is under way."""
        return self._writing is not None

    def poll(self) -> Saved | None:
        """The outcome of the save that has just ended on all ranks, if one has."""
        if self._writing is None:
            return None
        unfinished = torch.tensor([0 if self._writing.done() else 1])
        unfinished = unfinished.to(backends.current().device)
        dist.all_reduce(unfinished)
        return None if unfinished.item() else self.finish()

    def finish(self) -> Saved | None:
        """Wait for the save under way, if there is one."""
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, writing.wait())
        error = from_rank_0(lambda: self._publish(writing, results))
        return Saved(writing.manifest.step, error)

    def close(self) -> None:
        """The run leaves in good order: starting again from where it stands is no failure."""
        from_rank_0(lambda: manifest.forget_restarts(self.folder))

    def _publish(self, writing: _Writing, results: list[Any]) -> str | None:
        """Rank 0: complete the folder and name it, or remove it and say why."""
        failed = [f"rank {i}: {r}" for i, r in enumerate(results) if isinstance(r, str)]
        partial = writing.folder
        try:
            if failed:
                raise OSError("; ".join(failed))
            writing.plan.writer.finish(writing.plan.metadata, [r[0] for r in results])
            save_config(CheckpointingConfig("torch_dist", 1), str(partial))
            torch.save({}, partial / "common.pt")
            (partial / CONFIG).write_text(to_yaml(self.config))
            (partial / TOKENIZER).mkdir()
            self.tokenizer.save(partial / TOKENIZER)
            files = {name: entry for _, written in results for name, entry in written.items()}
            for path in partial.rglob("*"):
                name = path.relative_to(partial).as_posix()
                if path.is_file() and name not in files:
                    files[name] = manifest.record(path)
            writing.manifest.files.update(files)
            manifest.write(partial, writing.manifest)
            manifest.publish(partial, self.folder / manifest.name_of(writing.manifest.step))
        except Exception as error:  # whatever a full or failing disk makes a library raise
            shutil.rmtree(partial, ignore_errors=True)
            return _reason(error)
        c = self.config.checkpoint
        manifest.prune(self.folder, writing.manifest.step, c.keep_last, c.keep_every)
        manifest.forget_restarts(self.folder)
        return None


class _Plan(TorchDistSaveShardedStrategy):
    """The engine's strategy up to what each rank shall write; the writing is ours."""

    writer: FileSystemWriterAsync
    metadata: Any

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, planned: Any
    ) -> AsyncRequest:
        self.writer = writer
        self.metadata = planned[1]
        return AsyncRequest(None, (), [])


class _Writing:
    """A save under way on this rank: the forked process and the pipe that its result comes by."""

    def __init__(self, manifest: Manifest, folder: Path, plan: _Plan) -> None:
        self.manifest = manifest
        self.folder = folder
        self.plan = plan
        # What this rank writes: nothing, or one file (thread_count=1). On the host from here on.
        buckets = FileSystemWriterAsync.preload_tensors(plan.writer.write_buckets or [])
        self._result: Any = None if buckets else ([], {})
        if not buckets:
            return
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe(duplex=False)
        transforms = [plan.writer.transforms] if hasattr(plan.writer, "transforms") else []
        # Fork makes the snapshot: the next step changes the weights of this process only.
        self._process = context.Process(target=_write, args=(buckets[0], transforms, theirs))
        gc.disable()  # the child must not collect what belongs to the parent's device
        self._process.start()
        gc.enable()
        theirs.close()
        plan.writer.write_buckets = []  # the copies live on in the child alone

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._result is not None or self._pipe.poll()

    def wait(self) -> tuple[list[Any], dict[str, FileRecord]] | str:
        """(results for the engine's metadata, files written), or why it failed."""
        if self._result is None:
            try:
                self._result = self._pipe.recv()
                self._process.join()
            except EOFError:
                self._process.join()
                self._result = f"the writing process ended with {self._process.exitcode}"
            self._pipe.close()
        return self._result


def _write(bucket: Any, transforms: list[Any], pipe: Connection) -> None:
    """The forked process: write one file, bring it to the disk, checksum it."""
    die_with_parent()
    # Launchers signal whole process groups; the save must end all the same.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    results: queue.Queue[Any] = queue.Queue()
    unfinished: queue.Queue[int] = queue.Queue()
    unfinished.put(0)
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, results, unfinished, True)
    _, outcome = results.get()
    if isinstance(outcome, Exception):
        pipe.send(_reason(outcome))
        return
    path, name, _ = bucket
    try:
        pipe.send((outcome, {name: manifest.record(Path(path))}))
    except OSError as error:
        pipe.send(_reason(error))


def _make_folder(partial: Path) -> Path | str:
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        return _reason(error)
    return partial


def _reason(error: BaseException) -> str:
    """One line, with the system's own words where there are any below the library's."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return " ".join(str(error).split())[:500] or type(error).__name__
