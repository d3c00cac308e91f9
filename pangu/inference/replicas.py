"""Replicas of a model that decode different sequences, and experts that lie on ranks of several.

A pass of such a model is one of all ranks: a replica that has none to make at the time makes an
idle one, of tokens that nobody asked for and no cache keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from configs.schema import Config
from pangu import backends

IdlePass = Callable[[int], None]  # of so many tokens


class Replica:
    """This rank's place among replicas of a model, each of one tensor-parallel group.

    `number` of `count`. `speaks`: its ranks compute the same, and this one tells it. `control`: a
    group of all ranks, on their hosts.
    """

    def __init__(self, config: Config) -> None:
        timeout = timedelta(minutes=config.launch.timeout_minutes)
        self.control = dist.new_group(backend="gloo", timeout=timeout)
        size = parallel_state.get_tensor_model_parallel_world_size()
        self.number, self.count = dist.get_rank() // size, dist.get_world_size() // size
        self.speaks = parallel_state.get_tensor_model_parallel_rank() == 0
        self._joins = self.count > 1 and config.parallel.expert_model_parallel_size > 1
        self._idle: list[IdlePass] = []

    def agreed(self, tokens: Sequence[int]) -> list[int]:
        """What the replica's first rank has drawn, on all of its ranks; as many as there."""
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return list(tokens)
        chosen = torch.tensor(tokens, device=backends.current().device)
        dist.broadcast(chosen, parallel_state.get_tensor_model_parallel_src_rank(), group)
        return chosen.tolist()

    def register(self, idle: IdlePass) -> int:
        """The number of a kind of passes, for `turn`; the same on all ranks."""
        self._idle.append(idle)
        return len(self._idle) - 1

    def turn(self, kind: int, tokens: int) -> int:
        """Wait until a pass of this kind may be made; of how many tokens all ranks make it. Of
        kinds that ranks want to make, that which was registered last comes first."""
        while self._joins:
            chosen, size = self._next(kind, tokens)
            if chosen == kind:
                return size
            self._idle[chosen](size)
        return tokens

    def rest(self) -> None:
        """Make idle passes until no rank has one to make."""
        while self._joins:
            chosen, size = self._next(0, 0)
            if not size:
                return
            self._idle[chosen](size)

    def _next(self, kind: int, tokens: int) -> tuple[int, int]:
        """The kind that all ranks make next, and its tokens; none where nobody wants any."""
        wanted = torch.zeros(len(self._idle), dtype=torch.long)
        wanted[kind] = tokens
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self.control)
        sizes = wanted.tolist()
        chosen = max((kind for kind, size in enumerate(sizes) if size), default=0)
        return chosen, sizes[chosen]
