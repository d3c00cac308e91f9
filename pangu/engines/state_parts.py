"""The optimizer's state by parameter, whatever engine and optimizer hold it.

Each parameter's main copy and moments are seen as parts: this rank's piece of them. Whole tensors
go in and out, in the shape of the parameter, so that a checkpoint does not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MAIN = "main"  # the weights themselves, in the optimizer's precision
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Part:
    """Elements [start, end) of a parameter's main copy, which this rank's optimizer updates.

    `main` is None where other ranks of `group` hold all of the parameter; `group` is None where
    this rank holds all of it. Where AdamW updates the pieces of many parameters as one tensor,
    that is `flat`, and `main` lies at `offset` in it.
    """

    parameter: torch.nn.Parameter
    adam: torch.optim.Optimizer
    main: torch.Tensor | None
    start: int
    end: int
    group: dist.ProcessGroup | None
    flat: torch.Tensor | None = None
    offset: int = 0

    @property
    def state(self) -> dict[str, Any]:
        """What AdamW keeps beside the tensor that it updates."""
        assert self.main is not None
        return self.adam.state[self.main if self.flat is None else self.flat]

    def local(self, name: str) -> torch.Tensor | None:
        """This rank's piece of the main copy or of a moment."""
        if self.main is None or name == MAIN:
            return self.main
        kept = self.state[name]
        return kept if self.flat is None else self._piece(kept)

    def _piece(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.offset : self.offset + self.end - self.start]

    def whole(self, name: str) -> torch.Tensor:
        """The main copy or a moment in the parameter's shape, in float32 or wider. Collective over
        `group`.

        What must be gathered comes to the host, so that saving takes one whole parameter's room on
        the device and not three copies of the model.
        """
        local = self.local(name)
        if self.group is None or self.group.size() == 1:
            assert local is not None
            # Moments in 16 bits are told in 32, as ranks that gather them tell them.
            return local.detach().view(self.parameter.shape).to(_wide(local.dtype))
        double = self.parameter.dtype is torch.float64
        dtype, bits = (torch.float64, torch.int64) if double else (torch.float32, torch.int32)
        whole = torch.zeros(self.parameter.shape, dtype=dtype, device=self.parameter.device)
        if local is not None:
            whole.view(-1)[self.start : self.end] = local.detach()
        # As integers: added to 0.0, -0.0 would lose its sign.
        dist.all_reduce(whole.view(bits), group=self.group)
        return whole.cpu()

    def put(self, name: str, whole: torch.Tensor) -> None:
        """Take this rank's piece from a whole tensor."""
        local = self.local(name)
        if local is not None:
            with torch.no_grad():
                local.view(-1).copy_(whole.reshape(-1)[self.start : self.end])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def initialize(everything: list[Part]) -> None:
    """Give a fresh AdamW the zero moments that its first step would make."""
    for part in everything:
        if part.main is None or (state := part.state):
            continue
        if _counts_per_parameter(part.adam):
            state["step"] = torch.tensor(0.0)
        for name in MOMENTS:
            updated = (part.main if part.flat is None else part.flat).detach()
            dtype = getattr(part.adam, "moments", None)
            state[name] = torch.zeros_like(updated, dtype=dtype)


def optimizer_step(everything: list[Part]) -> int:
    """Updates done so far (for the bias correction), the same for all parameters of all ranks."""
    steps = {int(step) for part in everything for step in _step(part)}
    found: list[set[int]] = [set()] * dist.get_world_size()
    dist.all_gather_object(found, steps)
    counted = set.union(*found)
    if len(counted) > 1:
        raise RuntimeError(f"parameters disagree about the optimizer's step: {sorted(counted)}")
    return counted.pop() if counted else 0


def set_optimizer_step(everything: list[Part], step: int) -> None:
    """Go on counting from `step`."""
    for part in everything:
        if part.main is None:
            continue
        if _counts_per_parameter(part.adam):
            part.state["step"].fill_(step)
        else:
            for group in part.adam.param_groups:
                group["step"] = step


def _counts_per_parameter(adam: torch.optim.Optimizer) -> bool:
    """torch counts steps in each parameter's state, the fused AdamWs in the parameter group."""
    return type(adam).__module__.startswith("torch.")


def _step(part: Part) -> Iterator[Any]:
    if part.main is None:
        return
    if _counts_per_parameter(part.adam):
        yield part.state.get("step", 0)
    else:
        yield part.adam.param_groups[0].get("step", 0)
