"""Experts on their way between expert-parallel ranks, between two steps (Pangu Ultra MoE,
arXiv 2505.04519: executor of dynamic expert placement).

Shapes: E experts, X of them on each rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all

from configs.schema import Config
from pangu.engines import state_parts
from pangu.engines.contract import Engine
from pangu.engines.ranks import say
from pangu.engines.state_parts import MAIN, MOMENTS, Part
from pangu.moe.layer import ExpertLayer
from pangu.moe.load import RoutingLoad, device_imbalance
from pangu.moe.placement import Loads, Order, average, device_load_cv, plan


class ExpertPlacement:
    """Where the experts of every layer are (numbered as in `RoutingLoad`), the same on all ranks,
    and when they move: every `moe.placement_period` steps, in each layer whose coefficient of
    variation of device load falls by `moe.placement_threshold` or more.

    Nothing is ever written with experts elsewhere than at home, in the order of their numbers.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        self.moe, self.engine = config.moe, engine
        self.ranks = config.parallel.expert_model_parallel_size
        self.active = config.moe.placement == "dynamic" and config.model.num_experts > 0
        self.home: Order = np.arange(config.model.num_experts)
        self.orders: dict[int, Order] = {}  # of layers that are not at home
        self.averages: dict[int, Loads] = {}

    def after_step(self, step: int, load: RoutingLoad | None) -> dict[str, float]:
        """Count a step's choices, and move experts if it is time to. Collective.

        Returns:
            What the step's row says of devices: `device_imbalance` and `device_load_cv`, means of
            the layers, with experts where they were, and how many moved after it,
            `experts_moved`; {} with static placement.
        """
        if not self.active or load is None or not load.counts:
            return {}
        counts = {layer: c.double().numpy() for layer, c in load.counts.items()}
        for layer, counts_E in counts.items():
            self.averages[layer] = average(self.averages.get(layer), counts_E)
        spreads = [device_load_cv(c, self.order(n), self.ranks) for n, c in counts.items()]
        by_slot = {n: c[torch.from_numpy(self.order(n))] for n, c in load.counts.items()}
        row = {
            "device_imbalance": device_imbalance(by_slot, self.ranks, self.moe.top_k),
            "device_load_cv": float(np.mean(spreads)),
            "experts_moved": 0,
        }
        if step % self.moe.placement_period == 0:
            row["experts_moved"] = self._improve(step)
        return row

    def order(self, layer: int) -> Order:
        """The expert in each slot of a layer."""
        return self.orders.get(layer, self.home)

    def forget(self) -> None:
        """All weights and moments are about to be filled as they are at home."""
        self._place({})
        self.averages = {}

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Every expert at home, and afterwards where it was. Collective."""
        away = self.orders
        self._move({})
        yield
        self._move(away)

    def _improve(self, step: int) -> int:
        """Move experts where that pays; how many."""
        groups, wanted = self.moe.equal_groups, dict(self.orders)
        moved, before, after = 0, [], []
        for layer, loads_E in self.averages.items():
            now = self.order(layer)
            planned = plan(loads_E, now, self.ranks, groups)
            spreads = [device_load_cv(loads_E, order, self.ranks) for order in (now, planned)]
            gain, count = spreads[0] - spreads[1], int((planned != now).sum())
            if count and gain >= self.moe.placement_threshold:
                wanted[layer], moved = planned, moved + count
                before.append(spreads[0])
                after.append(spreads[1])
        if moved:
            self._move(wanted)
            say(
                f"step {step}: {moved} experts of {len(before)} layers move between ranks; the "
                f"coefficient of variation of device load there, {np.mean(before):.2f}, becomes "
                f"{np.mean(after):.2f}"
            )
        return moved

    def _move(self, wanted: dict[int, Order]) -> None:
        """Bring every layer's experts into the order wanted, home where none is named."""
        if not wanted and not self.orders:
            return
        everything = self.engine.state_parts()
        state_parts.initialize(everything)
        by_parameter = {part.parameter: part for part in everything}
        for number, layer in self._layers():
            now, then = self.order(number), wanted.get(number, self.home)
            if np.array_equal(now, then):
                continue
            for parameter in layer.experts.parameters():
                _exchange(parameter, by_parameter.get(parameter), now, then, layer.ep_group)
        self._place(wanted)

    def _place(self, orders: Mapping[int, Order]) -> None:
        self.orders = dict(orders)
        for number, layer in self._layers():
            layer.place(self.orders.get(number))

    def _layers(self) -> Iterator[tuple[int, ExpertLayer]]:
        for chunk in self.engine.chunks:
            for module in chunk.modules():
                if isinstance(module, ExpertLayer):
                    yield module.router.layer_number, module


@torch.no_grad()
def _exchange(
    parameter: torch.nn.Parameter,
    part: Part | None,
    now: Order,
    then: Order,
    group: dist.ProcessGroup,
) -> None:
    """A weight `[X, …]` with its main copy and moments, where it is trained."""
    if part is None:
        parameter.copy_(rows_of(parameter, now, then, group))
        return
    for name in (MAIN, *MOMENTS):
        rows = rows_of(part.whole(name).to(parameter.device), now, then, group)
        part.put(name, rows)
        if name == MAIN:
            parameter.copy_(rows)


def rows_of(
    rows_X: torch.Tensor, now: Order, then: Order, group: dist.ProcessGroup
) -> torch.Tensor:
    """From the rows `[X, …]` of the experts that are here now, those of the experts that are here
    then. Collective over `group`, whose ranks hold the slots."""
    room, rank, ranks = rows_X.size(0), group.rank(), group.size()
    sources = np.argsort(now)[then].reshape(ranks, room)  # the slot now of what is there then
    sent = [slots[slots // room == rank] - rank * room for slots in sources]
    come_from = sources[rank] // room
    received = np.bincount(come_from, minlength=ranks).tolist()
    outgoing = rows_X[torch.from_numpy(np.concatenate(sent)).to(rows_X.device)]
    flat = outgoing.flatten(1)
    arrived = all_to_all(group, flat, received, [len(rows) for rows in sent])
    places = torch.from_numpy(np.argsort(come_from, kind="stable")).to(rows_X.device)
    result = torch.empty_like(rows_X, memory_format=torch.contiguous_format)
    result.flatten(1)[places] = arrived
    return result
