"""What a device is. `select` is called once per process, before megatron-core is imported;
`current` gives the rest of the tree the chosen backend. Nothing else names a device type."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

BackendName = Literal["cpu", "cuda", "npu"]


@dataclass(frozen=True)
class Backend:
    """One kind of device.

    `device` is this process's own. `peak_tflops` is the dense matrix peak per device for a
    precision, or None where no sourced figure exists (then MFU is left out).
    """

    name: BackendName
    device: torch.device
    collective_library: Literal["gloo", "shared_memory", "nccl", "hccl"]
    default_precision: Literal["fp32", "bf16"]
    memory_bytes: Callable[[], int]  # peak allocated on the device; resident set on a CPU
    reset_peak_memory: Callable[[], None]
    synchronize: Callable[[], None]
    description: str
    total_memory_bytes: int  # of the device; on a CPU the machine's, shared by its processes
    matrix_units: int  # cores over which a library spreads the tiles of a product; 1 where unknown
    peak_tflops: Callable[[str], float | None]
    # Whether a tensor may be freed once its send is issued: streams keep the order, gloo does not.
    sends_in_stream_order: bool
    # Whether torch's AdamW has a fused step here; torch-npu brings an optimizer of its own.
    fused_adamw: bool


_current: Backend | None = None


def resolve(name: str) -> BackendName:
    """`auto` becomes the best device this machine has: npu, then cuda, then cpu."""
    if name != "auto":
        return name  # type: ignore[return-value]
    if importlib.util.find_spec("torch_npu") is not None:
        npu = importlib.import_module("pangu.backends.npu")
        if npu.is_available():
            return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def select(name: str = "auto", local_rank: int = 0, precision: str = "auto") -> Backend:
    """Choose the device of this process and fit megatron-core to it.

    Raises:
        RuntimeError: the backend's device or library is missing; the message says which.
    """
    global _current
    name = resolve(name)
    if _current is not None:
        if _current.name != name:
            raise RuntimeError(f"backend {_current.name} is already in use, cannot select {name}")
        return _current
    module = importlib.import_module(f"pangu.backends.{name}")
    _current = module.create(local_rank)
    module.fit_engine(precision)
    return _current


def current() -> Backend:
    """The backend of this process.

    Raises:
        RuntimeError: `select` was not called.
    """
    if _current is None:
        raise RuntimeError("no backend yet: call pangu.backends.select first")
    return _current


def torch_dtype(precision: str) -> torch.dtype:
    """The parameters' dtype for a `backend.precision`; `auto` takes the backend's default."""
    if precision == "auto":
        precision = current().default_precision
    return {
        "fp32": torch.float32,
        "fp64": torch.float64,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }[precision]
