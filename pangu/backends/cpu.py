"""A CPU process: gloo and shared memory, float32, and what an engine written for CUDA is given."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
from collections.abc import Iterator
from typing import Any, Literal

import torch

from pangu.backends import Backend, InPlaceOfCuda, Operators, shared_memory
from pangu.backends.host_tier import FileTier

DEVICE = torch.device("cpu")


class _Stream:
    """Work on a CPU is done when the call returns: there is nothing to wait for."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> object:
        return self if event is None else event

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class CpuNamespace:
    """Stands for `torch.cuda` inside megatron-core. Names it lacks (classes used in type checks)
    are torch.cuda's own."""

    Stream = _Stream
    Event = _Stream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def current_device() -> torch.device:
        return DEVICE

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_stream(device: object = None) -> _Stream:
        return _Stream()

    default_stream = current_stream

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: object) -> Iterator[None]:
        yield

    @staticmethod
    def synchronize(device: object = None) -> None: ...

    @staticmethod
    def empty_cache() -> None: ...

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


# Of <malloc.h>: M_MMAP_THRESHOLD at its largest value, no trimming (M_TRIM_THRESHOLD), and one heap
# for all threads (M_ARENA_MAX).
MALLOC_OPTIONS = {-3: 32 * 1024 * 1024, -1: 2**31 - 1, -8: 1}


def _unpinned_tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Rotary embeddings under context parallelism ask for pinned memory: a CPU has none to pin."""
    return torch.tensor(*args, **{**kwargs, "pin_memory": False})


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step.

    By default it gives large arrays back to the system at each free, and every step pays for
    zeroed pages again: 11,600 page faults a step in `benchmarks/training_speed.py`, 400 with this.
    And every thread has a heap of its own, gloo's two per process group too: what each once held
    for a message it keeps, 20 to 80 MB of a process that exchanges tokens.
    Other C libraries have no `mallopt` and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in MALLOC_OPTIONS.items():
            mallopt(option, value)


def _linear() -> Literal["torch", "onednn"]:
    """MKL, which torch asks for products in float32, is made for Intel's processors: on an AMD EPYC
    with AVX-512 oneDNN takes half the time, at 1 to 512 rows."""
    cpu = torch.cpu.get_capabilities()
    x86 = cpu["architecture"] == "x86_64"
    others = x86 and "Intel" not in cpu["cpu_name"] and torch.backends.mkldnn.is_available()
    return "onednn" if others else "torch"


def create(local_rank: int) -> Backend:
    """The CPU backend; every local rank is the same device."""
    keep_freed_memory()
    return Backend(
        name="cpu",
        device=DEVICE,
        collective_library="shared_memory" if shared_memory.register() else "gloo",
        default_precision="fp32",
        memory_bytes=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        reset_peak_memory=lambda: None,
        synchronize=lambda: None,
        total_memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        matrix_units=1,
        description=f"{platform.processor() or platform.machine()} CPU",
        peak_tflops=lambda precision: None,
        sensors=dict,
        sends_in_stream_order=False,
        reduces_float64=True,
        fused_adamw=True,
        asynchronous=False,
        block_elements=2**18,
        operators=Operators(
            adamw="fused",
            attention="sdpa",
            choice="torch",
            cross_entropy="blocks",
            grouped_matmul="loop",
            linear=_linear(),
            linear_cross_entropy="chunks",
            permute="torch",
            rms_norm="lean",
            rotary="torch",
            routing="torch",
            swiglu="blocks",
            weight_gradient="loop",
        ),
        in_one_order={},
        host_tier=FileTier,
        in_place_of_cuda=InPlaceOfCuda(
            namespace=CpuNamespace(),
            device_type="cpu",
            tensor_prefix="torch",
            tensor_method="to",
            torch_names={"tensor": _unpinned_tensor},
        ),
    )
