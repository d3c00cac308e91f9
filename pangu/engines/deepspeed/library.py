"""DeepSpeed itself, imported for the device of this process, and its JSON made from our tree."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from configs.schema import Config
from configs.violation import ConfigError, Violation
from pangu import backends
from pangu.engines.deepspeed import files

# Elements of a bucket of gradients, as DeepSpeed has it where nothing is said.
LARGEST_BUCKET = 500_000_000


def load(*, nvme: bool = False) -> ModuleType:
    """DeepSpeed's package; with `nvme` its operator for drives too, which has been built. Process
    groups must exist.

    On a CPU it would compile C++ (shared-memory collectives, its own AdamW), for minutes, and wait
    without a word for the lock of a build that was killed. Its table of what can be built says no
    there: torch's own operators do the same.
    """
    backend = backends.current()
    os.environ["DS_ACCELERATOR"] = backend.name
    # Which device DeepSpeed takes: this process's, whatever its launcher calls it.
    os.environ["LOCAL_RANK"] = str(backend.device.index or 0)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    _take_one_optimizer()
    if not backend.asynchronous:
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    if nvme:
        files.install()
    return deepspeed


@cache
def _take_one_optimizer() -> None:
    """Stage 1 in bfloat16 with the optimizer of all other precisions and of stage 2, which can do
    it; DeepSpeed takes one whose state has another form."""
    from deepspeed.runtime import engine

    theirs = engine.DeepSpeedEngine._do_optimizer_sanity_check

    def chosen(self: Any, adam: Any) -> str | None:
        name = theirs(self, adam)
        return engine.ZERO_OPTIMIZATION if name == engine.BFLOAT16 else name

    engine.DeepSpeedEngine._do_optimizer_sanity_check = chosen


def swap_folder(config: Config) -> Path:
    """Where a run's state lies on the drive: its own, since DeepSpeed names files by rank alone."""
    run = Path(config.run_dir).absolute()
    name = hashlib.sha256(str(run).encode()).hexdigest()[:12]
    return Path(config.engine.nvme_path).absolute() / f"{run.name}-{name}"


def settings(config: Config, elements: int, groups: type) -> dict[str, Any]:
    """DeepSpeed's JSON for a configuration, with `engine.config` merged in.

    The optimizer is torch's AdamW, the learning rate our schedule's; `elements` are the model's.

    Raises:
        ConfigError: DeepSpeed does not take `engine.config`.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    zero: dict[str, Any] = {
        "stage": config.parallel.zero_stage,
        "reduce_bucket_size": min(LARGEST_BUCKET, elements),
    }
    if config.engine.offload != "none":
        zero["offload_optimizer"] = {"device": config.engine.offload}
        if config.engine.offload == "nvme":
            zero["offload_optimizer"]["nvme_path"] = str(swap_folder(config))
        if config.parallel.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}  # on a drive see WeightsFile
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.num_microbatches,
        # Stage 0 neither tells its norm nor looks for numbers that are none: the engine does both.
        "gradient_clipping": config.optimizer.clip_grad if config.parallel.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if backends.torch_dtype(config.backend.precision) is torch.bfloat16:
        # Sums of gradients, within a rank and over ranks, in float32 as megatron-core's.
        made |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        made["communication_data_type"] = "fp32"
    whole = _merged(made, config.engine.config)
    try:
        DeepSpeedConfig(deepcopy(whole), groups)
    except Exception as error:  # its own, pydantic's, assertions: whatever a value makes it raise
        if not config.engine.config:
            raise
        reason = f"DeepSpeed does not take it: {' '.join(str(error).split())}"
        raise ConfigError([Violation("engine.config", config.engine.config, reason)]) from None
    return whole


def _merged(made: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both, mapping by mapping; where they meet, `more`."""
    both = made | more
    for key in made.keys() & more.keys():
        if isinstance(made[key], dict) and isinstance(more[key], dict):
            both[key] = _merged(made[key], more[key])
    return both
