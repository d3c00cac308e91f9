"""Pangu Ultra MoE's hierarchy: all-gather between nodes, all-to-all inside a node, and a
reduce-scatter between nodes at the end of the way back (arXiv 2505.04519, on expert-parallel
communication). Experts are whole: they are spread over as many ranks as tensor and expert
parallelism have together.

Shapes: T tokens of this rank, H hidden, K choices per token, X experts of a rank, D nodes of n
expert-parallel ranks (EP = D·n).

Every token goes once to each other node, to the rank in the same place, with its choices. From
there on the node's ranks are by themselves: whatever takes rows to experts inside it sees D·T
tokens and the node's n·X experts. That is an exchange of rows; for MoGE with whole groups on every
rank it is MoGE's own, so that splits are known beforehand at both levels, no counts are exchanged
and the host never waits.

Sent per rank and layer, forward: between nodes (D-1)·T·(H + 2·K) values, where an all-to-all sends
K·T·H·(D-1)/D, and (D-1)·T·H on the way back; inside, on average, K·T·(n-1)/n rows each way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from pangu.moe.config import MoETransformerConfig
from pangu.moe.dispatch import nodes
from pangu.moe.dispatch.alltoall import AllToAllDispatcher
from pangu.moe.dispatch.choices import pack, unpack
from pangu.moe.dispatch.dispatcher import Dispatcher, DispatchRecord
from pangu.moe.dispatch.messages import begin, gather, reduce_scatter, travelled
from pangu.moe.dispatch.moge import MogeDispatcher
from pangu.moe.dispatch.rows import gather_rows


@dataclass
class Hierarchical(DispatchRecord):
    """`inside` is the record of the same call inside the node."""

    inside: DispatchRecord | None = None


class HierarchicalDispatcher(Dispatcher[Hierarchical]):
    """For every router, where expert-parallel ranks fill whole nodes and experts are not sliced."""

    def __init__(
        self,
        num_local_experts: int,
        config: MoETransformerConfig,
        pg_collection: ProcessGroupCollection,
        choices: int | None,
    ) -> None:
        super().__init__(num_local_experts, config, pg_collection, choices)
        groups = nodes.current()
        self.between = groups.between
        num_nodes, ranks = groups.between.size(), groups.inside.size()
        if num_nodes * ranks != self.ep_size or self.tp_size > 1:
            raise ValueError(
                f"{num_nodes} nodes of {ranks} ranks do not hold whole experts of EP x ETP = "
                f"{self.ep_size} x {self.tp_size} ranks"
            )
        self.node_experts = num_local_experts * ranks
        kind, per_node = _inside(config, self.ep_size, num_nodes, choices)
        here = ProcessGroupCollection(ep=groups.inside, tp_ep=groups.inside)
        here.expt_tp = self.tp_group
        self.inside = kind(num_local_experts, config, here, per_node)

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[Hierarchical, torch.Tensor, torch.Tensor]:
        """Tokens `[T, H]` and what is to be known of their choices."""
        packed = pack(probs, routing_map, self.choices)
        return Hierarchical(tokens.shape), tokens.flatten(0, -2), packed

    def token_dispatch(
        self, record: Hierarchical, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All nodes' tokens, then those of them whose experts are on this rank."""
        arrived = begin(
            (hidden_states, gather_rows(self.between, self.config.moe.dispatch_dtype)),
            (probs, gather(self.between)),
        )
        record.meanwhile()
        tokens, packed = arrived()
        first = self.between.rank() * self.node_experts
        weights, chosen = unpack(packed, self.choices, first, self.node_experts)
        record.inside, *sent = self.inside.dispatch_preprocess(tokens, chosen, weights)
        return self.inside.token_dispatch(record.inside, *sent)

    def dispatch_postprocess(
        self, record: Hierarchical, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.inside.dispatch_postprocess(record.inside, hidden_states, probs)

    def combine_preprocess(self, record: Hierarchical, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.inside.combine_preprocess(record.inside, hidden_states)

    def token_combine(self, record: Hierarchical, hidden_states: torch.Tensor) -> torch.Tensor:
        """This node's part of the output of all nodes' tokens, then the sum of all nodes' parts of
        this rank's tokens: `[T, H]`."""
        back = self.inside.token_combine(record.inside, hidden_states)
        parts = self.inside.combine_postprocess(record.inside, back)
        return travelled(parts, reduce_scatter(self.between), record.meanwhile_back)

    def combine_postprocess(
        self, record: Hierarchical, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        return hidden_states.view(record.hidden_shape)


def _inside(
    config: MoETransformerConfig, ep_size: int, num_nodes: int, choices: int | None
) -> tuple[type[Dispatcher[Any]], int | None]:
    """What takes rows to experts inside a node, and how many choices a token has there; None where
    tokens differ in it."""
    moe = config.moe
    if choices is None or moe.router != "moge" or moe.num_expert_groups % num_nodes:
        return AllToAllDispatcher, None
    whole_groups = moe.num_expert_groups % ep_size == 0
    return MogeDispatcher if whole_groups else AllToAllDispatcher, choices // num_nodes
