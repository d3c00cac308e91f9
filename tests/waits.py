"""What would make a host wait for its device, noticed on a CPU.

On a device a step is a queue of kernels; whoever asks for a value (`item`, `tolist`, `nonzero`, a
copy to the host), or has one copied there that is not pinned, waits until the queue is empty. Here
this is noticed where it is done, with the line of the project or of the engine that does it.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
# Operators of torch whose result, or whose result's shape, the host has to know.
ASKING = (
    "_local_scalar_dense",
    "bincount",
    "is_nonzero",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique",
    "unique2",
)
# Methods that read memory past torch's dispatcher, or copy to the host.
READING = ("tolist", "numpy", "cpu", "__array__")
# The interpreter copies a kernel's arguments; a GPU does not. What notices is not who asks.
INNER = ("/triton/runtime/", "-packages/torch/", "waits.py", "contextlib.py")


class _Asked(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ASKING:
            _note(self.found, name)
        return function(*args, **(kwargs or {}))


def _note(found: list[str], name: str) -> None:
    frames = traceback.extract_stack()
    if any("/triton/runtime/" in frame.filename for frame in frames):
        return
    asking = [frame for frame in frames if not any(part in frame.filename for part in INNER)]
    file = asking[-1].filename.rpartition("-packages/")[2].removeprefix(f"{ROOT}/")
    found.append(f"{file} {asking[-1].name}: {name}")


def _noting_copies(found: list[str]):
    """`Tensor.to` another device, which waits for it unless it is told not to."""
    move = torch.Tensor.to

    def to(tensor, *given, **named):
        where = [named.get("device"), *given]
        moves = any(isinstance(each, str | torch.device) for each in where)
        if moves and not named.get("non_blocking"):
            _note(found, "to")
        return move(tensor, *given, **named)

    return to


def _noting_makers(found: list[str]):
    """`torch.tensor`, which copies from the host to the device."""
    make = torch.tensor

    def tensor(*given, **named):
        if named.get("device") is not None:
            _note(found, "tensor")
        return make(*given, **named)

    return tensor


@contextlib.contextmanager
def noticed() -> Iterator[list[str]]:
    """Every question inside, as `file function: operator`, in order."""
    found: list[str] = []

    def noting(name):
        read = getattr(torch.Tensor, name)

        def method(tensor, *given, **named):
            _note(found, name)
            return read(tensor, *given, **named)

        return method

    with contextlib.ExitStack() as stack:
        for name in READING:
            stack.enter_context(patch.object(torch.Tensor, name, noting(name)))
        stack.enter_context(patch.object(torch.Tensor, "to", _noting_copies(found)))
        stack.enter_context(patch.object(torch, "tensor", _noting_makers(found)))
        stack.enter_context(_Asked(found))
        yield found
