"""Copies between a device and its host that neither waits for.

A blocking copy either way makes the host wait until all that it has queued on the device is done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pangu import backends


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the host's, on this process's device."""
    backend = backends.current()
    if backend.device.type == tensor.device.type:
        return tensor
    return tensor.pin_memory().to(backend.device, non_blocking=True)


def scalar(value: float) -> torch.Tensor:
    """`[1]`, float32, on this process's device: filled there, not copied."""
    return torch.full((1,), value, dtype=torch.float32, device=backends.current().device)


def read_later(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy to the host, behind the work that makes the values; what is returned waits for
    it and gives them. Nobody may change the values meanwhile."""
    if values.is_cpu:
        return lambda: values
    stand_in = backends.current().in_place_of_cuda
    namespace = torch.cuda if stand_in is None else stand_in.namespace
    place = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    place.copy_(values, non_blocking=True)
    over = namespace.Event()
    over.record()

    def read() -> torch.Tensor:
        over.synchronize()
        return place

    return read
