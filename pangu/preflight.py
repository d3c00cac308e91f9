"""The one verdict on a run before it starts: `pangu.train`, its sweeps and `pangu.doctor` ask here.

No torch, nothing written: rules of the configuration (`configs.check`), then what this machine
has: backend, files, folders, memory.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from configs import check
from configs.change_rules import changes, refused
from configs.compose import read_file
from configs.schema import Config
from configs.violation import ConfigError, Violation
from launch import port
from launch.environment import STARTED_BY, ProcessEnvironment
from pangu import machine_check
from pangu.checkpoint import manifest
from pangu.data import files
from simulator.api import Policy, load_hardware, pipeline_ranks, settle

Precision = Literal["auto", "fp32", "fp64", "bf16", "fp16", "fp8", "int8", "fp4"]

# What a run makes inside its folder: a file of such a name would stop it half way.
RUN_FOLDERS = ("checkpoints", "logs", "tensorboard", "tokenizer")
# Of an idle rank's own: interpreter, torch and megatron-core, without pages that ranks share.
PROCESS_BYTES = 150 << 20
# A sequence's place in the order of a run: 24 bytes, twice while the parts are put together.
ORDER_BYTES = 48
# Forecasts of CPU runs were within 10 %; above this factor no run can be.
SURELY = 1.25


@dataclass(frozen=True)
class Verdict:
    """The configuration, where one can be made, with the modules that `memory=auto` chooses;
    everything that keeps it from running; and that choice."""

    config: Config | None
    found: list[Violation]
    policy: Policy | None = None


def resolve(process: ProcessEnvironment, overrides: list[str]) -> tuple[Config, Policy | None]:
    """The checked configuration of a run that can start, and what `memory=auto` has chosen in it.

    Raises:
        ConfigError: with every violation.
    """
    verdict = examine(process, overrides)
    if verdict.config is None or verdict.found:
        raise ConfigError(verdict.found)
    return verdict.config, verdict.policy


def examine(process: ProcessEnvironment, overrides: list[str]) -> Verdict:
    """What a run would meet as this process: one of a launcher's, or alone on this machine."""
    started = None
    if process.launched:
        counted = process.count_is_set_by()
        started = check.Started(process.world_size, process.local_world_size, *counted)
    config, found = check.examine(overrides, started=started, alone=not process.launched)
    if config is None:
        return Verdict(None, found)
    here = process.local_world_size if process.launched else config.launch.processes
    found += wrong_machine(config)
    sound = not found
    found += faults_here(config)
    found += another_model(config)
    if process.rank == 0:
        found += unusable_folders(config)
        found += taken_port(config)
        found += no_mlflow(config)
    if not sound:
        return Verdict(config, found)
    settled = with_modules(config)
    found += settled.found
    if settled.config and not settled.found:
        config = settled.config
        found += too_large(config, here)
    return Verdict(config, found, settled.policy)


def with_modules(config: Config) -> Verdict:
    """What `memory=auto` chooses for a configuration without violations."""
    try:
        settled, policy = settle(config)
    except ConfigError as error:
        return Verdict(config, error.violations)
    return Verdict(settled, [], policy)


def plans_a_cluster(config: Config) -> bool:
    """Whether the configuration is for other processes than `pangu.train` alone would start."""
    launch = config.launch
    return launch.nodes > 1 or config.devices not in (None, launch.processes)


def wrong_machine(config: Config) -> list[Violation]:
    """What is wrong with `hardware`, from which a run is forecast."""
    if not config.hardware:
        return []
    try:
        hardware = load_hardware(config.hardware)
    except ConfigError as error:
        return error.violations
    backend = machine_check.backend(config.backend.name)[0]
    if config.memory.recompute_granularity != "auto" or plans_a_cluster(config):
        return []
    if backend == hardware.backend:
        return []
    reason = (
        f"memory=auto counts bytes of a run on {hardware.backend}, and this one is on {backend}"
    )
    hint = "the file that python -m pangu.calibrate writes here"
    return [Violation("hardware", hardware.name, reason, hint)]


def faults_here(config: Config) -> list[Violation]:
    """What is wrong with the backend and the corpus on this machine."""
    name = config.backend.name
    found = [Violation("backend", name, why) for why in machine_check.impossible(name)]
    if config.engine.name == "deepspeed" and (why := machine_check.unusable_deepspeed()):
        hint = "pip install 'pangu-moe[deepspeed]'; or engine.name=megatron"
        found.append(Violation("engine.name", "deepspeed", why, hint))
    just_read = STARTED_BY in os.environ  # by the process that started this one
    return found + files.faults(config, just_read=just_read)


def another_model(config: Config) -> list[Violation]:
    """What the checkpoint that a run would go on from says of this model: other weights, or another
    function that `checkpoint.allow_changes` does not name.

    Its manifest is not looked at: the run itself finds the newest *sound* one and compares again.
    """
    resume = config.checkpoint.resume
    if resume == "never":
        return []
    folder = Path(config.run_dir if resume == "auto" else resume)
    try:
        newest = manifest.complete(folder / "checkpoints")[:1] or [folder]
        saved = newest[0] / "config.yaml"
        if newest[0] == folder and (resume == "auto" or not saved.is_file()):
            return []
        then = read_file(saved, "checkpoint.resume")
    except (OSError, ConfigError):
        return []  # damaged: the run goes back to the one before, and says so
    return refused(changes(then, config), config.checkpoint.allow_changes, str(newest[0]))


def unusable_folders(config: Config) -> list[Violation]:
    """Folders that a run writes into, where it could not."""
    folders = {"run_dir": [config.run_dir, *(f"{config.run_dir}/{name}" for name in RUN_FOLDERS)]}
    if config.data.name != "synthetic":
        folders["data.cache_dir"] = [config.data.cache_dir]
    if config.engine.nvme_path:
        folders["engine.nvme_path"] = [config.engine.nvme_path]
    found = []
    for key, wanted in folders.items():
        folder = wanted[0]
        try:
            _try_to_make(Path(folder))
            for folder in filter(os.path.lexists, wanted):
                with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                    file.write(bytes(1 << 16))  # a full disk still makes empty files
        except (OSError, ValueError) as error:
            reason = f"{folder} cannot be written to: {getattr(error, 'strerror', None) or error}"
            found.append(Violation(key, wanted[0], reason, "another folder"))
    return found


def taken_port(config: Config) -> list[Violation]:
    """Where rank 0 could not answer Prometheus."""
    number = config.watch.prometheus_port
    if number is None or not (why := port.obstacle(number)):
        return []
    hint = f"watch.prometheus_port={port.free_port()}"
    return [Violation("watch.prometheus_port", number, why, hint)]


def no_mlflow(config: Config) -> list[Violation]:
    """Whether there is no MLflow for who asks for it."""
    if config.watch.mlflow is None or importlib.util.find_spec("mlflow"):
        return []
    reason = "MLflow is told by its package, which is not installed"
    return [Violation("watch.mlflow", config.watch.mlflow, reason, "pip install mlflow-skinny")]


def _try_to_make(folder: Path) -> None:
    """Whether a folder that is not there could be made, without leaving one.

    Raises:
        OSError: it could not.
    """
    wanted = folder.absolute()
    above = next(path for path in (wanted, *wanted.parents) if os.path.lexists(path))
    if above != wanted:
        with tempfile.TemporaryDirectory(dir=above) as trial:
            (Path(trial) / wanted.relative_to(above)).mkdir(parents=True)


def too_large(config: Config, processes: int) -> list[Violation]:
    """What cannot fit into this machine's memory, for a configuration without violations.

    Args:
        processes: of this machine.
    """
    memory = machine_check.memory_bytes()
    found = []
    if memory < processes * PROCESS_BYTES:
        reason = f"{processes} processes of {PROCESS_BYTES >> 20} MiB at least do not fit into the "
        reason += f"{_gib(memory)} of this machine"
        hint = f"launch.processes={max(1, memory // (2 * PROCESS_BYTES))}"
        found.append(Violation("launch.processes", processes, reason, hint))
    sequences = _sequences(config)
    if config.data.name != "synthetic" and memory < sequences * ORDER_BYTES:
        reason = f"the order of {sequences:,} sequences takes {_gib(sequences * ORDER_BYTES)}, "
        reason += f"this machine has {_gib(memory)}"
        found.append(Violation("train.steps", config.train.steps, reason, "fewer steps"))
    if machine_check.backend(config.backend.name)[0] == "cpu":
        found += _does_not_fit(config, processes, memory)
    return found


def _does_not_fit(config: Config, processes: int, memory: int) -> list[Violation]:
    typed = replace(config, backend=replace(config.backend, precision=precision(config)))
    each = [rank.memory for rank in pipeline_ranks(typed)]
    fullest = max(each, key=lambda one: float(one.peak))
    peaks = [float(one.peak) for one in each]
    # All stages are here, or which are is not known.
    share = sum(peaks) / len(peaks) if processes == config.world_size else min(peaks)
    if max(processes * share, max(peaks)) <= SURELY * memory:
        return []
    held = float(fullest.weights + fullest.gradients + fullest.optimizer)
    reason = f"the fullest rank needs {_gib(held)} for weights, gradients and optimizer and "
    reason += f"{_gib(float(fullest.peak) - held)} for activations; this machine has {_gib(memory)}"
    reason += f" for {processes} ranks" if processes > 1 else ""
    key = "model.num_layers" if held > float(fullest.peak) / 2 else "train.seq_length"
    value = config.model.num_layers if key.startswith("model") else config.train.seq_length
    hint = "a smaller model, more devices" if key.startswith("model") else "shorter sequences"
    return [Violation(key, value, reason, f"{hint}, or a smaller micro-batch")]


def _sequences(config: Config) -> int:
    """That the longest phase reads."""
    train = config.train
    phases = [
        phase.steps * (phase.global_batch_size or train.global_batch_size)
        for phase in config.optimizer.phases
    ]
    return max(phases, default=train.steps * train.global_batch_size)


def precision(config: Config) -> Precision:
    """What `auto` would be: float32 for a run on this machine's CPU, else bfloat16."""
    if config.backend.precision != "auto":
        return config.backend.precision
    here = not plans_a_cluster(config) and machine_check.backend(config.backend.name)[0] == "cpu"
    return "fp32" if here or config.backend.name == "cpu" else "bf16"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size < 2**50 else f"{size / 2**30:.2g} GiB"
