"""One process of a run, from joining its peers to leaving them."""

from __future__ import annotations

import logging
import warnings

import torch.distributed as dist

from configs.compose import ConfigError, Violation, to_yaml
from configs.schema import Config
from launch.environment import ProcessEnvironment
from pangu import backends


def run(config: Config, process: ProcessEnvironment) -> int:
    """Train as `config` says. The exit code is 0 when the run reached its end.

    The configuration must have been checked for `process.world_size` ranks.

    Raises:
        ConfigError: this machine does not have the backend.
    """
    # The engine and torch announce their own deprecations on every rank.
    warnings.filterwarnings("ignore", module="megatron|torch")
    # It knows no MLP but its own ("Unknown MLP type").
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    try:
        backends.select(config.backend.name, process.local_rank, config.backend.precision)
    except RuntimeError as error:
        raise ConfigError([Violation("backend", config.backend.name, str(error))]) from None

    # After the choice of the backend: megatron-core must find its device.
    from pangu.model.build import build_model
    from pangu.training import distributed, schedule
    from pangu.training.expert_load import LoadWindow
    from pangu.training.loop import Trainer, phase_datasets, run_folder
    from pangu.training.metrics import MetricsFile
    from pangu.training.optimizer import build_optimizer, wrap_model
    from pangu.training.state import RunState

    distributed.initialize(config)
    try:
        folder = run_folder(config)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config))
        state = RunState()
        phase = schedule.phase_at(config, state.step)
        datasets = phase_datasets(config, phase)
        if dist.get_rank() == 0:
            # a run stays readable when its corpus moves, or Python's library with an upgrade
            datasets.tokenizer.save(folder / "tokenizer")
        chunks, settings = build_model(config)
        wrapped = wrap_model(config, settings, chunks)
        trainer = Trainer(
            config=config,
            chunks=wrapped,
            optimizer=build_optimizer(config, wrapped),
            phase=phase,
            datasets=datasets,
            state=state,
            metrics=MetricsFile(folder, active=dist.get_rank() == 0),
            load=LoadWindow(folder, config.moe, active=dist.get_rank() == 0),
        )
        trainer.train()
    finally:
        distributed.shutdown()
    return 0
