"""What runs a model: a device, an engine, processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from configs.limits import Limits, Positive, Ranks


@dataclass
class BackendConfig:
    """Which device runs the model, and in which precision."""

    name: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    precision: Literal["auto", "fp32", "fp64", "bf16", "fp16", "fp8", "int8", "fp4"] = "auto"
    threads: Annotated[int, Limits(0, 4096)] = 0  # CPU threads per process; 0 = cores / processes
    # null: measured with the device's own name; the peak behind MFU, in TFLOPS
    peak_tflops: Positive | None = None


@dataclass
class EngineConfig:
    """What trains the model: megatron-core's optimizer, or DeepSpeed's ZeRO around the same model.

    `offload` says where DeepSpeed keeps the optimizer's state, and at stage 3 the weights between
    their uses: with `nvme` the state is in files below `nvme_path`, a folder on the drive, and the
    weights are in the host's memory. `config` has further keys of its JSON
    (`configs.deepspeed_keys` names those that the tree decides).
    """

    name: Literal["megatron", "deepspeed"] = "megatron"
    offload: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str = ""
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class LaunchConfig:
    """How many processes. `processes` is per node; torchrun, msrun and Slurm set their own."""

    processes: Annotated[int, Limits(1, 1024)] = 1
    nodes: Ranks = 1
    timeout_minutes: Annotated[float, Limits(0, 1e6, positive=True)] = 10.0  # of every collective
