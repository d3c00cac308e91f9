"""An Ascend NPU through torch-npu. Written against its documented interface; not run on an NPU."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

from pangu.backends import Backend
from pangu.engines.megatron.fitting import import_engine, redirect, rename_tensor_method

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


def fit_engine(precision: str = "auto") -> None:
    """Point megatron-core's CUDA names at torch.npu.

    torch-npu's own `transfer_to_npu` does this for every module of the process; here the rest of
    the tree keeps its names, so that a mistake shows.
    """
    # One stream for launches keeps collectives and matrix products in the order they were issued.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    npu = _namespace()
    constants = {
        "cuda": "npu",
        "torch.cuda.FloatTensor": "torch.npu.FloatTensor",
        "torch.cuda.HalfTensor": "torch.npu.HalfTensor",
        "torch.cuda.BFloat16Tensor": "torch.npu.BFloat16Tensor",
    }
    redirect(import_engine(jit=False), npu, constants)
    language: Any = importlib.import_module(
        "megatron.core.models.common.language_module.language_module"
    )
    rope: Any = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    rename_tensor_method(language.LanguageModule.setup_embeddings_and_output_layer, "cuda", "npu")
    rename_tensor_method(rope.get_pos_emb_on_this_cp_rank, "cuda", "npu")
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: npu.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: npu.set_rng_state(state)


def create(local_rank: int) -> Backend:
    """The NPU numbered `local_rank`.

    Raises:
        RuntimeError: torch-npu or CANN is missing, or there is no such device.
    """
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
        sends_in_stream_order=True,
        fused_adamw=False,
    )
