"""What every dispatcher is: six stages, of which two communicate, and a record that goes along.

Shapes: T tokens of this rank, H hidden, E experts, X of them on this rank, N rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from pangu.moe.config import MoETransformerConfig
from pangu.moe.dispatch.messages import nothing
from pangu.ops.permute import Permutation


@dataclass
class DispatchRecord:
    """What the stages of one micro-batch, or of a chunk of it, leave to each other. It is made anew
    by each call, since several may be under way in the same layer."""

    hidden_shape: torch.Size  # of the layer's input
    permutation: Permutation | None = None  # of the rows that the experts see
    # What the layer does while tokens are on their way to experts, and on their way back.
    meanwhile: Callable[[], None] = field(default=nothing, kw_only=True)
    meanwhile_back: Callable[[], None] = field(default=nothing, kw_only=True)
    # What `agree` said of this chunk; None where it was not asked.
    agreed: Any = field(default=None, kw_only=True)


Record = TypeVar("Record", bound=DispatchRecord)


class Dispatcher(ABC, Generic[Record]):
    """Moves tokens to their experts and back; the stages are called in the order written here.

    A dispatcher itself holds sizes and groups alone, nothing of a call. `choices` is how many
    experts every token has; None where tokens differ in it.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: MoETransformerConfig,
        pg_collection: ProcessGroupCollection,
        choices: int | None,
    ) -> None:
        self.num_local_experts = num_local_experts
        self.config = config
        self.choices = choices
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.tp_ep_group = pg_collection.tp_ep
        self.ep_size, self.tp_size = self.ep_group.size(), self.tp_group.size()

    def agree(self, maps: Sequence[torch.Tensor]) -> Sequence[Any]:
        """What ranks must know of each other's choices `[T, E]` before chunks of tokens travel, of
        all chunks at once: later it would wait behind their rows. Communicates where
        `token_dispatch` would."""
        return [None] * len(maps)

    @abstractmethod
    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[Record, torch.Tensor, torch.Tensor]:
        """From tokens `[..., H]`, map and weights `[T, E]`: the record, and what is to be sent."""

    @abstractmethod
    def token_dispatch(
        self, record: Record, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send to the ranks that hold the experts; what this rank received. Communicates, and
        calls `record.meanwhile` once its first messages are under way."""

    @abstractmethod
    def dispatch_postprocess(
        self, record: Record, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows `[N, H]` sorted by expert, rows per expert `[X]`, weights `[N]`."""

    @abstractmethod
    def combine_preprocess(self, record: Record, hidden_states: torch.Tensor) -> torch.Tensor:
        """From the experts' output `[N, H]`: what is to be sent back."""

    @abstractmethod
    def token_combine(self, record: Record, hidden_states: torch.Tensor) -> torch.Tensor:
        """Send back; what this rank received. Communicates, and calls `record.meanwhile_back` once
        its last message is under way."""

    @abstractmethod
    def combine_postprocess(self, record: Record, hidden_states: torch.Tensor) -> torch.Tensor:
        """The sum of each token's experts, in the shape of the layer's input."""
