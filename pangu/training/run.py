"""One process of a run, from joining its peers to leaving them."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from configs.change_rules import leaves
from configs.compose import to_yaml
from configs.schema import Config
from configs.violation import ConfigError, Violation
from launch import port
from launch.environment import ProcessEnvironment, report_refusal
from pangu import backends
from pangu.engines.megatron.fitting import select_backend
from pangu.engines.ranks import say
from pangu.processes import PEER_LOST, last_step
from pangu.report.run_files import replace_text
from pangu.training.resilience import (
    Diverged,
    StopSignal,
    forget_traceback,
    is_failed_collective,
    leave_traceback,
    missing_ranks,
    tracebacks,
)

if TYPE_CHECKING:
    from pangu.checkpoint.restore import Found
    from pangu.checkpoint.run_state import RunState
    from pangu.engines.contract import Engine
    from pangu.training.loop import Trainer
    from pangu.training.metrics import Watcher
    from pangu.training.schedule import PhaseAt


def run(config: Config, process: ProcessEnvironment) -> int:
    """Train as `config` says, from where `checkpoint.resume` says.

    The configuration must have been checked for `process.world_size` ranks.
    The exit code is 0 when the run reached its end, or was told to stop, and saved; 1 when its last
    steps are in no checkpoint; 3 when it diverged; 4 when other ranks are lost.

    Raises:
        ConfigError: this machine does not have the backend, or the run cannot start from the
            checkpoint.
    """
    forget_traceback(Path(config.run_dir), process.rank)
    try:
        return _run(config, process)
    except ConfigError:
        raise
    except Exception:
        leave_traceback(Path(config.run_dir), process.rank)
        raise


def _run(config: Config, process: ProcessEnvironment) -> int:
    stop = StopSignal(speaks=process.rank == 0)
    # The engine and torch announce their own deprecations on every rank.
    warnings.filterwarnings("ignore", module="megatron|torch")
    try:
        select_backend(config.backend.name, process.local_rank, config.backend.precision)
    except RuntimeError as error:
        raise ConfigError([Violation("backend", config.backend.name, str(error))]) from None

    # After the choice of the backend: megatron-core must find its device.
    from pangu.engines.megatron import process_groups
    from pangu.training.finish import finish

    try:
        _join(config, process)
        try:
            trainer = build_trainer(config, stop)
        except OSError as error:
            raise _unusable(config, error) from None
        code = trainer.train()
        if trainer.state.step >= config.train.steps:
            finish(trainer)
        if code:
            say(trainer.lost())
        return code
    except Diverged as error:
        say(f"the run has diverged: {error}")
        return 3
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            # Raised wherever this process happens to be when the kernel tells it.
            where = f"rank {process.rank}, after step {last_step(Path(config.run_dir))}"
            sentence = f"error: {where}: a process that reads data ahead has ended: {error}"
            print(sentence, file=sys.stderr)
            return 1
        if not is_failed_collective(error):
            raise
        _say_lost(config, process, error)
        return PEER_LOST
    finally:
        process_groups.shutdown()


def _join(config: Config, process: ProcessEnvironment) -> None:
    """Meet the other ranks.

    Raises:
        ConfigError: rank 0 cannot listen on the port that all were told.
    """
    from pangu.engines.megatron import process_groups

    try:
        process_groups.initialize(config)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        hint = f"for all ranks, another: {port.free_port()} is free here"
        violation = Violation("MASTER_PORT", process.master_port, port.IN_USE, hint)
        raise ConfigError([violation]) from None


def _say_lost(config: Config, process: ProcessEnvironment, error: RuntimeError) -> None:
    """Say which ranks are missing; where this rank waited for them goes into a file."""
    log = Path(config.run_dir) / "logs" / f"rank_{process.rank}.traceback"
    where = f"; traceback in {log}"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(traceback.format_exception(error)))
    except OSError:
        where = ""
    said = str(error).strip().splitlines() or [type(error).__name__]
    missing = missing_ranks() if dist.is_initialized() else ""
    died = tracebacks(Path(config.run_dir))
    line = f"error: rank {process.rank} waited in vain for another after step "
    line += f"{last_step(Path(config.run_dir))}: {said[0]}{where}"
    # Alone, the end of the failed rank's log comes last anyway.
    shown = died if missing and process.launcher != "local" else ""
    print("\n".join(filter(None, (line, missing, shown))), file=sys.stderr, flush=True)
    report_refusal(os.environ, "\n".join(filter(None, (line, missing, died))))


def _unusable(config: Config, error: OSError) -> Exception:
    """A mistake of the user's where it is about a file in a folder of the run's; else the error."""
    folders = {"run_dir": config.run_dir, "data.cache_dir": config.data.cache_dir}
    for key, folder in folders.items():
        if error.filename and Path(folder) in Path(error.filename).parents:
            name = str(error.filename).removesuffix(".partial")  # renamed once it is written
            reason = f"cannot be used: {name}: {error.strerror}"
            return ConfigError([Violation(key, folder, reason, "another folder")])
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        # Writing, unlike opening, does not say which file it was.
        hint = "room there, in data.cache_dir and in the folder for temporary files"
        reason = f"a file of the run cannot be written: {error.strerror}"
        return ConfigError([Violation("run_dir", config.run_dir, reason, hint)])
    return error


def build_trainer(config: Config, stop: StopSignal) -> Trainer:
    """Everything that a run needs, at the step that it starts from. Process groups must exist.

    Raises:
        ConfigError: the run cannot start from the checkpoint.
    """
    from pangu.checkpoint import restore
    from pangu.training.expert_load import LoadWindow
    from pangu.training.loop import Trainer, phase_datasets
    from pangu.training.metrics import MetricsFile

    first = dist.get_rank() == 0
    found = restore.find(config)
    folder = Path(config.run_dir)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "config.yaml", to_yaml(config))
    state, phase = _start(config, found)
    datasets = phase_datasets(config, phase, state)
    if found:
        restore.refuse_other_tokenizer(config, found, datasets.tokenizer)
    if first:
        # a run stays readable when its corpus moves, or Python's library with an upgrade
        datasets.tokenizer.save(folder / "tokenizer")
    engine = build_engine(config)
    if found:
        found = restore.restore(config, found, engine)
        if found.manifest.step != state.step:  # the newest could not be read after all
            restore.refuse_other_model(config, found.path)
            state, phase = _start(config, found)
            datasets = phase_datasets(config, phase, state)
        say(f"resuming from {found.path}")
        if changed := restore.describe_changes(config, found):
            say(f"changed since that checkpoint: {changed}")
        if codes := restore.describe_codes(config, found):
            say(codes)
    return Trainer(
        config=config,
        engine=engine,
        phase=phase,
        datasets=datasets,
        state=state,
        metrics=MetricsFile(folder, active=first, watchers=watchers(config) if first else ()),
        load=LoadWindow(folder, config.moe, active=first),
        stop=stop,
    )


def build_engine(config: Config) -> Engine:
    """The model and its optimizer, by `engine.name`. Process groups must exist.

    Raises:
        ConfigError: this machine's backend cannot run it so.
    """
    if config.engine.name == "deepspeed":
        from pangu.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine.build(config)
    from pangu.engines.megatron.engine import MegatronEngine

    return MegatronEngine.build(config)


def watchers(config: Config) -> list[Watcher]:
    """Who is told of the run: Prometheus and MLflow, where the keys of `watch` ask for it.

    Raises:
        ConfigError: the port was taken since it was looked at; MLflow's server cannot be used.
    """
    watch, name = config.watch, Path(config.run_dir).name
    found: list[Watcher] = []
    if watch.prometheus_port is not None:
        from pangu.training.prometheus import Exporter

        try:
            number, sensors = watch.prometheus_port, backends.current().sensors
            found.append(Exporter(number, sensors=sensors, model=config.model.name, run=name))
        except OSError as error:
            reason = f"cannot be listened on: {error.strerror}"
            violation = Violation("watch.prometheus_port", watch.prometheus_port, reason)
            raise ConfigError([violation]) from None
    if watch.mlflow is not None:
        from pangu.training.mlflow import MlflowRun, first_line

        keys = dict(leaves(config))
        try:
            run = MlflowRun(watch.mlflow, experiment=config.model.name, name=name, parameters=keys)
        except Exception as error:  # of MLflow, of whatever the URI leads it to
            reason = f"cannot be told of the run: {first_line(error)}"
            raise ConfigError([Violation("watch.mlflow", watch.mlflow, reason)]) from None
        found.append(run)
    return found


def _start(config: Config, found: Found | None) -> tuple[RunState, PhaseAt]:
    """Where a run goes on from a checkpoint, or begins."""
    from pangu.checkpoint.run_state import RunState
    from pangu.training import schedule

    state = found.state if found else RunState()
    phase = schedule.phase_at(config, state.step)
    if state.step == phase.first_step:
        state.consumed_sequences = 0  # those of the phase before, which ended there
    return state, phase
