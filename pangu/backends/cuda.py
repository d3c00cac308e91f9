"""An NVIDIA GPU: megatron-core's native home, so there is nothing to fit."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from dataclasses import replace

import torch

from pangu.backends import Backend, Operators, memory_gauges
from pangu.backends.host_tier import PinnedTier

# Dense BF16 peaks in TFLOPS, from the vendor's data sheets; float16 has the same.
BF16_PEAKS = {
    "A100": 312.0,
    "H100": 989.0,
    "H800": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "B300": 2250.0,
    "GB200": 2500.0,
    "GB300": 2500.0,
}

# Without our own kernels.
PLAIN = Operators(
    adamw="fused",
    attention="sdpa",
    choice="torch",
    cross_entropy="blocks",
    grouped_matmul="fused",
    linear="torch",
    linear_cross_entropy="chunks",
    permute="torch",
    rms_norm="torch",
    rotary="torch",
    routing="torch",
    swiglu="megatron",
    weight_gradient="separate",
)
OURS = replace(
    PLAIN,
    adamw="triton",
    choice="triton",
    cross_entropy="triton",
    permute="triton",
    rms_norm="triton",
    rotary="triton",
    routing="triton",
    swiglu="triton",
    weight_gradient="triton",
)

IN_ONE_ORDER = {"attention": "fixed", "grouped_matmul": "fixed"}


def kernels_missing(capability: tuple[int, int]) -> str:
    """Why our kernels cannot run on a GPU of this compute capability; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if capability < (8, 0):
        return "the GPU is older than compute capability 8.0"
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    if not any(shutil.which(name) for name in compilers):
        return "Triton finds no C compiler (gcc, clang or $CC)"
    return ""


def operators(capability: tuple[int, int], *, say: bool) -> Operators:
    """With our kernels where they can run; one line says where they cannot."""
    if missing := kernels_missing(capability):
        if say:
            print(f"note: operators run in their plain forms: {missing}", file=sys.stderr)
        return PLAIN
    return OURS


def create(local_rank: int) -> Backend:
    """The GPU numbered `local_rank`.

    Raises:
        RuntimeError: torch sees no GPU, or fewer than local_rank + 1.
    """
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise RuntimeError(f"local rank {local_rank} needs a GPU, torch sees {count}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    name, capability = properties.name, (properties.major, properties.minor)

    def peak(precision: str) -> float | None:
        if precision not in ("bf16", "fp16"):
            return None
        matches = [part for part in BF16_PEAKS if part in name]
        return BF16_PEAKS[max(matches, key=len)] if matches else None

    def sensors() -> dict[str, float]:
        told = memory_gauges(*torch.cuda.mem_get_info(device))
        with contextlib.suppress(Exception):  # no nvidia-ml-py, or a driver that tells nothing
            told["device_temperature_celsius"] = torch.cuda.temperature(device)
        return told

    return Backend(
        name="cuda",
        device=device,
        collective_library="nccl",
        default_precision="bf16",
        memory_bytes=lambda: torch.cuda.max_memory_allocated(device),
        reset_peak_memory=lambda: torch.cuda.reset_peak_memory_stats(device),
        synchronize=lambda: torch.cuda.synchronize(device),
        total_memory_bytes=properties.total_memory,
        matrix_units=properties.multi_processor_count,
        description=name,
        peak_tflops=peak,
        sensors=sensors,
        sends_in_stream_order=True,
        reduces_float64=True,
        fused_adamw=True,
        asynchronous=True,
        block_elements=None,
        operators=operators(capability, say=local_rank == 0),
        host_tier=lambda folder: PinnedTier(torch.cuda),
        in_place_of_cuda=None,
        in_one_order=None if kernels_missing(capability) else IN_ONE_ORDER,
    )
