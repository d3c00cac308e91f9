"""One process of a run, from joining its peers to leaving them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from configs.compose import to_yaml
from configs.schema import Config
from configs.violation import ConfigError, Violation
from launch.environment import ProcessEnvironment
from pangu import backends
from pangu.training.resilience import Diverged, StopSignal, is_failed_collective, missing_ranks

if TYPE_CHECKING:
    from pangu.training.loop import Trainer


def run(config: Config, process: ProcessEnvironment) -> int:
    """Train as `config` says, from where `checkpoint.resume` says.

    The configuration must have been checked for `process.world_size` ranks.
    The exit code is 0 when the run reached its end, or was told to stop, and saved; 1 when its last
    steps are in no checkpoint; 3 when it diverged.

    Raises:
        ConfigError: this machine does not have the backend, or the run cannot start from the
            checkpoint.
    """
    stop = StopSignal(speaks=process.rank == 0)
    # The engine and torch announce their own deprecations on every rank.
    warnings.filterwarnings("ignore", module="megatron|torch")
    try:
        backends.select(config.backend.name, process.local_rank, config.backend.precision)
    except RuntimeError as error:
        raise ConfigError([Violation("backend", config.backend.name, str(error))]) from None

    # After the choice of the backend: megatron-core must find its device.
    from pangu.engines.megatron import process_groups
    from pangu.training.finish import finish

    process_groups.initialize(config)
    try:
        try:
            trainer = build_trainer(config, stop)
        except OSError as error:
            raise _unusable(config, error) from None
        code = trainer.train()
        if trainer.state.step >= config.train.steps:
            finish(trainer)
        if code:
            process_groups.say(trainer.lost())
        return code
    except Diverged as error:
        process_groups.say(f"the run has diverged: {error}")
        return 3
    except RuntimeError as error:
        if is_failed_collective(error) and (sentence := missing_ranks()):
            error.add_note(sentence)
        raise
    finally:
        process_groups.shutdown()


def _unusable(config: Config, error: OSError) -> Exception:
    """A mistake of the user's where it is about a file in a folder of the run's; else the error."""
    folders = {"run_dir": config.run_dir, "data.cache_dir": config.data.cache_dir}
    for key, folder in folders.items():
        if error.filename and Path(folder) in Path(error.filename).parents:
            reason = f"cannot be used: {error.filename}: {error.strerror}"
            return ConfigError([Violation(key, folder, reason, "another folder")])
    return error


def build_trainer(config: Config, stop: StopSignal) -> Trainer:
    """Everything that a run needs, at the step that it starts from. Process groups must exist.

    Raises:
        ConfigError: the run cannot start from the checkpoint.
    """
    from pangu.checkpoint import restore
    from pangu.checkpoint.run_state import RunState
    from pangu.engines.megatron import process_groups
    from pangu.engines.megatron.optimizer import build_optimizer, wrap_model
    from pangu.model.build import build_model
    from pangu.training import schedule
    from pangu.training.expert_load import LoadWindow
    from pangu.training.loop import Trainer, phase_datasets
    from pangu.training.metrics import MetricsFile

    first = dist.get_rank() == 0
    found = restore.find(config)
    folder = Path(config.run_dir)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
    state = found.state if found else RunState()
    phase = schedule.phase_at(config, state.step)
    if state.step == phase.first_step:
        state.consumed_sequences = 0  # those of the phase before, which ended there
    datasets = phase_datasets(config, phase, state)
    if found:
        restore.refuse_other_tokenizer(config, found, datasets.tokenizer)
    if first:
        # a run stays readable when its corpus moves, or Python's library with an upgrade
        datasets.tokenizer.save(folder / "tokenizer")
    chunks, settings = build_model(config)
    wrapped = wrap_model(config, settings, chunks)
    optimizer = build_optimizer(config, wrapped)
    if found:
        restore.restore(config, found, wrapped, optimizer)
        process_groups.say(f"resuming from {found.path}")
        if changed := restore.describe_changes(config, found):
            process_groups.say(f"changed since that checkpoint: {changed}")
    return Trainer(
        config=config,
        chunks=wrapped,
        optimizer=optimizer,
        phase=phase,
        datasets=datasets,
        state=state,
        metrics=MetricsFile(folder, active=first),
        load=LoadWindow(folder, config.moe, active=first),
        stop=stop,
    )
