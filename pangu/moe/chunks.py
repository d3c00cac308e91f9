"""An MoE layer's tokens in chunks, whose messages go beside each other's experts.

While the experts compute one chunk, the next is on its way to them and the one before on its way
back. What is begun, computed meanwhile and waited for, line by line, of C chunks:

    chunk 0 there                       | shared expert
    chunk 1 there                       | experts of chunk 0
    chunk 2 there, chunk 0 back         | experts of chunk 1
    …
    chunk C-2 back                      | experts of chunk C-1
    chunk C-1 back                      |

The backward pass goes from the last line to the first: a message is two nodes of autograd
(`dispatch/messages.py`), and between them lies what was computed between them. The experts' weight
gradients of a chunk are made while the gradients of its rows travel, so that the first chunk's,
which come last, have something beside them too.

Tokens are routed before they are cut: losses, counts and choices are those of the whole. Where
they travel on two levels, those between nodes have something beside them, and those inside a node
are waited for.

Shapes: T tokens of this rank, H hidden, E experts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pangu.moe.dispatch.dispatcher import DispatchRecord
from pangu.moe.dispatch.messages import nothing
from pangu.ops.grouped_matmul import Postponed

if TYPE_CHECKING:
    from pangu.moe.layer import ExpertLayer

Arrived = tuple[DispatchRecord, torch.Tensor, torch.Tensor]


class ChunkedPass:
    """One forward pass of a layer over `[S, B, H]`, in `moe.dispatch_chunks`."""

    def __init__(self, layer: ExpertLayer, hidden_states: torch.Tensor) -> None:
        self.layer, self.hidden_states = layer, hidden_states
        self.stages = layer.token_dispatcher
        weights_TE, chosen_TE = layer.route(hidden_states)
        sizes = chunk_sizes(chosen_TE.size(0), layer.config.moe.dispatch_chunks)
        parts = [x.split(sizes) for x in (hidden_states.flatten(0, 1), chosen_TE, weights_TE)]
        self.parts = list(zip(*parts, strict=True))
        self.agreed = self.stages.agree(parts[1])
        self.shared: torch.Tensor | None = None
        self.later: list[Postponed] = []
        self.arrived: dict[int, Arrived] = {}  # at this rank's experts
        self.done: dict[int, tuple[DispatchRecord, torch.Tensor]] = {}  # by them
        self.returned: list[torch.Tensor] = []

    def output(self) -> torch.Tensor:
        """What the layer gives: `[S, B, H]`."""
        last = len(self.parts) - 1
        for chunk in range(last + 1):
            self._there(chunk)
        if last:
            self._back(last - 1, partial(self._compute, last))
        else:
            self._compute(0)
        self._back(last)
        output = torch.cat(self.returned).view(self.hidden_states.shape)
        return output if self.shared is None else output + self.shared

    def _there(self, chunk: int) -> None:
        tokens, chosen, weights = self.parts[chunk]
        record, *sent = self.stages.dispatch_preprocess(tokens, chosen, weights)
        record.agreed = self.agreed[chunk]
        record.meanwhile = partial(self._beside, chunk)
        self.arrived[chunk] = (record, *self.stages.token_dispatch(record, *sent))

    def _beside(self, chunk: int) -> None:
        """What is done while `chunk` is on its way there."""
        if chunk == 0:
            self._postpone()
            self.shared = self.layer.shared_experts_compute(self.hidden_states)
        elif chunk == 1:
            self._between(chunk)
        else:
            self._back(chunk - 2, partial(self._between, chunk))

    def _between(self, chunk: int) -> None:
        """`chunk` is on its way there, the second before it on its way back: compute the first.
        In the backward pass both messages have begun when weight gradients are made."""
        self._compute(chunk - 1)
        self._postpone()

    def _postpone(self) -> None:
        before = self.later[-1] if self.later else None
        self.later.append(self.layer.experts.postponed(before))

    def _compute(self, chunk: int) -> None:
        record, *received = self.arrived.pop(chunk)
        rows, counts, weights = self.stages.dispatch_postprocess(record, *received)
        output, _ = self.layer.experts(rows, counts, weights, postponed=self.later[chunk])
        output = output.to(self.layer.combine_dtype)
        self.done[chunk] = record, self.stages.combine_preprocess(record, output)

    def _back(self, chunk: int, meanwhile: Any = nothing) -> None:
        record, output = self.done.pop(chunk)
        record.meanwhile_back = meanwhile
        output = self.stages.token_combine(record, output)
        output = self.stages.combine_postprocess(record, output)
        self.returned.append(output.to(self.hidden_states.dtype))


def chunk_sizes(tokens: int, chunks: int) -> list[int]:
    """As even as can be, the same on all ranks."""
    return [tokens // chunks + (i < tokens % chunks) for i in range(chunks)]
