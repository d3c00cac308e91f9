"""An NPU whose memory is the host's: every operator on its tensors runs its CPU kernel in place."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pangu.backends import turns
from tests.npu.late_copies import LATE, watch_events

# What torch-npu itself does without an operator of CANN's.
OWN = ("empty", "empty_strided", "new_empty_strided", "record_stream", "set_", "resize_")
OWN += ("is_pinned", "_pin_memory", "pin_memory")


def matmul_backward(
    grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """torch-npu differentiates `matmul` as one operator, which has no CPU kernel."""
    first = torch.matmul(grad, right.transpose(-1, -2)).sum_to_size(left.shape)
    second = torch.matmul(left.transpose(-1, -2), grad).sum_to_size(right.shape)
    return first if mask[0] else None, second if mask[1] else None


REFERENCES: dict[str, Any] = {"aten.matmul_backward.default": matmul_backward}


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as a CPU tensor."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    raw = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(raw, dtype=torch.uint8).untyped_storage()
    place = (tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.empty(0, dtype=tensor.dtype).set_(flat, *place)


def without_kernel(called: Counter[str]) -> list[str]:
    """Operators that were called and that torch-npu has no kernel for: it would run them on the
    host, if at all. Those that torch makes of others are no kernel's matter."""
    ways = ("PrivateUse1", "AutogradPrivateUse1", "CompositeExplicitAutograd")
    ways += ("CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
    found = []
    for each in sorted(called):
        space, _, name = each.partition(".")
        name = f"{space}::{name.removesuffix('.default')}"
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        if not any(has(name, way) for way in ways):
            found.append(name)
    return found


def _on_npu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


class HostMemory(TorchDispatchMode):
    """`called` counts the operators by name. A mode is its thread's: beside a backward pass, a
    forward pass has one of its own."""

    def __init__(self, called: Counter[str] | None = None) -> None:
        super().__init__()
        self.called: Counter[str] = Counter() if called is None else called
        side_by_side = turns.side_by_side

        def both(first: Callable[[], Any], second: Callable[[], Any]) -> Any:
            def inside() -> Any:
                with self.__class__(self.called):
                    return second()

            return side_by_side(first, inside)

        if called is None:
            turns.side_by_side = both  # before `pangu.engines.megatron.overlap` is imported
            watch_events()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self.called[str(func)] += 1
        name = func._schema.name.partition("::")[2]
        if name == "allgather_":
            return _gather_list(*args, **kwargs)
        device = kwargs.get("device")
        given = [value for value in tree_leaves((args, kwargs)) if _on_npu(value)]
        wanted = device is not None and torch.device(device).type == "npu"
        native = name in OWN or func.is_view or func.namespace == "c10d"
        if native or not (given or wanted):
            return func(*args, **kwargs)
        if name == "copy_" and LATE.is_beside():
            target, source = on_host(args[0]), on_host(args[1])  # of memory that they do not hold
            LATE.put_off(lambda: target.copy_(source))
            return args[0]
        return _run(func, args, kwargs, torch.device(device) if device else given[0].device)


def _run(func: Any, args: Any, kwargs: dict[str, Any], target: torch.device) -> Any:
    theirs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def lend(value: Any) -> Any:
        if not _on_npu(value):
            return value
        host = on_host(value)
        theirs[id(host)] = (value, host)
        return host

    args, kwargs = tree_map(lend, (args, kwargs))
    if target.type == "npu" and kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    if getattr(kwargs.get("generator"), "device", None) == target:
        kwargs["generator"] = None  # the host's, as a run on the CPU has it
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False

    def give_back(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or target.type != "npu":
            return value
        if id(value) in theirs:
            return theirs[id(value)][0]
        made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=target)
        if value.numel():
            on_host(made).copy_(value)
        return made

    return tree_map(give_back, REFERENCES.get(str(func), func)(*args, **kwargs))


def _gather_list(outputs: Any, inputs: Any, group: Any, *rest: Any, **kwargs: Any) -> Any:
    """torch-npu gathers into one tensor as well, then copies with operators past the dispatcher."""
    (each,), (own,) = outputs, inputs
    flat = own.new_empty(sum(tensor.numel() for tensor in each))
    _, work = torch.ops.c10d._allgather_base_(flat, own.contiguous(), group, *rest, **kwargs)
    work.wait()
    parts = on_host(flat).split([tensor.numel() for tensor in each])
    for tensor, part in zip(each, parts, strict=True):
        on_host(tensor).copy_(part.view(tensor.shape))
    return outputs, work
