"""What a device is, and which variant of each operator it runs. `select` is called once per
process; `current` gives the rest of the tree the chosen backend. Nothing else compares the names of
devices."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pangu.backends.host_tier import HostTier

BackendName = Literal["cpu", "cuda", "npu"]


@dataclass(frozen=True)
class Operators:
    """The variant of each operator: the part of its function's name behind the operator's, in
    `pangu/ops/<operator>.py`."""

    adamw: Literal["torch", "fused", "triton"]
    attention: Literal["sdpa", "npu", "fixed"]
    choice: Literal["torch", "triton"]
    cross_entropy: Literal["blocks", "triton"]
    grouped_matmul: Literal["loop", "fused", "npu", "fixed"]
    linear: Literal["torch", "onednn"]
    linear_cross_entropy: Literal["plain", "chunks"]
    permute: Literal["torch", "npu", "triton"]
    rms_norm: Literal["lean", "torch", "npu", "triton"]
    rotary: Literal["torch", "triton"]
    routing: Literal["torch", "triton"]
    swiglu: Literal["blocks", "megatron", "npu", "triton"]
    weight_gradient: Literal["separate", "loop", "npu", "triton"]


@dataclass(frozen=True)
class InPlaceOfCuda:
    """What an engine that was written for CUDA is given instead."""

    namespace: Any  # for torch.cuda
    device_type: str  # for "cuda"
    tensor_prefix: str  # for "torch.cuda" in the names of tensor types
    tensor_method: str  # for `cuda` in tensor.cuda(device)
    torch_names: Mapping[str, object]  # further names of torch, with what stands for them


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
    # What the device tells of itself now, by the name of a gauge: memory that anybody has of it and
    # its temperature. From any thread; empty where the device is the host.
    sensors: Callable[[], dict[str, float]]
    # Whether a tensor may be freed once its send is issued: streams keep the order, gloo does not.
    sends_in_stream_order: bool
    # Whether its collectives add float64 up: HCCL's do not.
    reduces_float64: bool
    # Whether torch's AdamW has a fused step here; torch-npu brings an optimizer of its own.
    fused_adamw: bool
    # Whether a call returns before its work is done, which a device does behind the host.
    asynchronous: bool
    # Elements that passes over a tensor take at a time, to find them in a core's cache.
    block_elements: int | None
    operators: Operators
    # Where activations wait that are swapped: a file in the folder given, where the device is the
    # host itself.
    host_tier: Callable[[Path], HostTier]
    in_place_of_cuda: InPlaceOfCuda | None  # None where it is CUDA
    # Variants of operators for decoding in which a row's sums do not depend on how many rows there
    # are; empty where tokens do not anyway, None where there are none.
    in_one_order: Mapping[str, Any] | None = None


def memory_gauges(free: int, total: int) -> dict[str, float]:
    """Bytes of a device as `Backend.sensors` tells them."""
    used = (total - free) / 2**30
    return {"device_memory_used_gib": used, "device_memory_total_gib": total / 2**30}


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


def select(name: str = "auto", local_rank: int = 0) -> Backend:
    """Choose the device of this process.

    Raises:
        RuntimeError: the backend's device or library is missing; the message says which.
    """
    global _current
    name = resolve(name)
    if _current is not None:
        if _current.name != name:
            raise RuntimeError(f"backend {_current.name} is already in use, cannot select {name}")
        return _current
    _current = importlib.import_module(f"pangu.backends.{name}").create(local_rank)
    return _current


def current() -> Backend:
    """The backend of this process.

    Raises:
        RuntimeError: `select` was not called.
    """
    if _current is None:
        raise RuntimeError("no backend yet: call pangu.backends.select first")
    return _current


def use(operators: Operators) -> None:
    """From now on these variants are this process's."""
    global _current
    _current = replace(current(), operators=operators)


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
