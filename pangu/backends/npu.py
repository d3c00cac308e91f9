"""An Ascend NPU through torch-npu. Written against its documented interface; not run on an NPU."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

from pangu.backends import Backend, InPlaceOfCuda, Operators, memory_gauges
from pangu.backends.host_tier import PinnedTier

NO_CANN = (
    "torch-npu is installed but CANN's libraries are not (libhccl.so cannot be loaded): source "
    "CANN's set_env.sh, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 and use backend=cpu"
)


def is_available() -> bool:
    """Whether torch-npu loads and sees a device."""
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError):
        return False
    return bool(getattr(torch, "npu").is_available())  # noqa: B009 - torch-npu adds it


def _namespace() -> Any:
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:
        raise RuntimeError(
            NO_CANN if "libhccl" in str(error) else f"torch-npu cannot be imported: {error}"
        ) from None
    return getattr(torch, "npu")  # noqa: B009 - torch-npu adds it


def create(local_rank: int) -> Backend:
    """The NPU numbered `local_rank`.

    Raises:
        RuntimeError: torch-npu or CANN is missing, or there is no such device.
    """
    # One stream for launches keeps collectives and matrix products in the order they were issued.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    npu = _namespace()
    count = npu.device_count()
    if local_rank >= count:
        raise RuntimeError(f"local rank {local_rank} needs an NPU, found {count}")
    npu.set_device(local_rank)
    return Backend(
        name="npu",
        device=torch.device("npu", local_rank),
        collective_library="hccl",
        default_precision="bf16",
        memory_bytes=npu.max_memory_allocated,
        reset_peak_memory=npu.reset_peak_memory_stats,
        synchronize=npu.synchronize,
        total_memory_bytes=npu.get_device_properties(local_rank).total_memory,
        matrix_units=1,
        description=npu.get_device_name(local_rank),
        # 910B comes in three parts that share a name: the peak must be given by the user.
        peak_tflops=lambda precision: None,
        # torch-npu has no call for the temperature.
        sensors=lambda: memory_gauges(*npu.mem_get_info(local_rank)),
        sends_in_stream_order=True,
        reduces_float64=False,
        fused_adamw=False,
        asynchronous=True,
        block_elements=None,
        operators=Operators(
            adamw="torch",
            attention="npu",
            choice="torch",
            cross_entropy="blocks",
            grouped_matmul="npu",
            linear="torch",
            linear_cross_entropy="chunks",
            permute="npu",
            rms_norm="npu",
            rotary="torch",
            routing="torch",
            swiglu="npu",
            weight_gradient="npu",
        ),
        # torch-npu's own `transfer_to_npu` renames for every module of the process; here the rest
        # of the tree keeps its names, so that a mistake shows.
        host_tier=lambda folder: PinnedTier(npu),
        in_place_of_cuda=InPlaceOfCuda(
            namespace=npu,
            device_type="npu",
            tensor_prefix="torch.npu",
            tensor_method="npu",
            torch_names={},
        ),
    )
