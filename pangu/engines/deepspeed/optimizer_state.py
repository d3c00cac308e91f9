"""Where DeepSpeed keeps AdamW's state: by parameter (stage 0), or in flat tensors of which each
rank has an equal piece (stages 1 to 3), which may lie on a drive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pangu.engines.state_parts import MAIN, Part


class Drive:
    """Stage 3's flat tensors on a drive: one group at a time has its buffers in memory, between
    steps the one that was asked for last."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.here: int | None = None
        self.changed = False

    def holds(self, group: int) -> bool:
        """Whether a group is on the drive: small ones stay in memory."""
        return bool(self.optimizer._swappable_optimizer_subgroup(group))

    def bring(self, group: int) -> None:
        """Read a group into memory, after what is there has been put back."""
        if self.here != group:
            self.put_back()
            self.optimizer._optimizer_states_and_gradient_swap_in(group)
            self.here = group

    def put_back(self) -> None:
        """Write what has been changed, and give up the buffers. Before every step."""
        if self.here is not None and self.changed:
            self.optimizer._optimizer_states_and_gradient_swap_out(self.here)
        elif self.here is not None:
            self.optimizer._release_swap_buffers(self.here)
        self.here, self.changed = None, False


@dataclass(frozen=True)
class PartOnDrive(Part):
    """A part of a flat tensor that is empty unless its group has been brought into memory."""

    drive: Drive | None = None
    group_number: int = 0

    @property
    def state(self) -> dict[str, Any]:
        assert self.drive
        self.drive.bring(self.group_number)
        if not super().state:
            self.drive.changed = True  # zero moments come
        return super().state

    def local(self, name: str) -> torch.Tensor | None:
        assert self.drive
        assert self.flat is not None
        self.drive.bring(self.group_number)
        return self._piece(self.flat.detach() if name == MAIN else self.state[name])

    def whole(self, name: str) -> torch.Tensor:
        return super().whole(name).clone()  # else of buffers that the next group takes

    def put(self, name: str, whole: torch.Tensor) -> None:
        assert self.drive
        self.drive.bring(self.group_number)
        self.drive.changed = True
        super().put(name, whole)


def parts(replica: Any, adam: torch.optim.Optimizer, drive: Drive | None) -> list[Part]:
    """One part per trained parameter, in the same order on all ranks that share them."""
    stage = replica.zero_optimization_stage()
    if stage == 3:
        return list(_cut_weights(replica.optimizer, adam, drive))
    if stage > 0:
        return list(_cut_groups(replica.optimizer, adam))
    groups = [group["params"] for group in adam.param_groups]
    return [Part(p, adam, p, 0, p.numel(), None) for group in groups for p in group]


def _cut_groups(optimizer: Any, adam: torch.optim.Optimizer) -> Iterator[Part]:
    """Stages 1 and 2: all parameters of a group in one flat tensor, cut into equal pieces."""
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        ranks = optimizer.real_dp_process_group[group]
        for parameter in optimizer.bit16_groups[group]:
            held = parameter._hp_mapping
            if held is None:
                yield Part(parameter, adam, None, 0, 0, ranks)
                continue
            start = held.lp_fragment_address.start
            end = start + held.lp_fragment_address.numel
            offset = held.hp_fragment_address.start
            main = flat.detach()[offset : offset + end - start]
            yield Part(parameter, adam, main, start, end, ranks, flat, offset)


def _cut_weights(
    optimizer: Any, adam: torch.optim.Optimizer, drive: Drive | None
) -> Iterator[Part]:
    """Stage 3: every parameter cut into equal pieces, this rank's of a group in one flat tensor."""
    for group, parameters in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[group]
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = min(parameter.ds_process_group.rank() * size, parameter.ds_numel)
            end = min(start + size, parameter.ds_numel)
            main = flat.detach()[offset : offset + end - start]
            ranks = parameter.ds_process_group
            part = (parameter, adam, main, start, end, ranks, flat, offset)
            if drive and drive.holds(group):
                yield PartOnDrive(*part, drive, group)
            else:
                yield Part(*part)
            offset += size
