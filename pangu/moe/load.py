"""How evenly tokens are spread over experts and devices, and what the router's losses were.

Shapes: E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config

from configs.schema import MoEConfig
from pangu import backends
from pangu.backends.copies import read_later


class LayerLoad:
    """What one router saw since it was last read, on this rank.

    `counts`: choices of each expert that it had room for, int64 `[E]`. `losses`: sums of the
    auxiliary loss (with its coefficient) and of the z-loss (likewise), and the number of
    micro-batches, of which a rank that holds one part in n counts 1/n.
    """

    def __init__(self, num_experts: int) -> None:
        device = backends.current().device
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.losses = torch.zeros(3, dtype=torch.float32, device=device)

    def clear(self) -> None:
        self.counts.zero_()
        self.losses.zero_()


@dataclass(frozen=True)
class RoutingLoad:
    """Of all ranks together: `counts[n]` is int64 `[E]`, the choices of layer n (from 1, MTP
    layers after the others), on the host. The losses are means over layers and micro-batches,
    without their coefficients: an auxiliary loss of 1 is perfect balance."""

    counts: dict[int, torch.Tensor]
    aux_loss: float
    z_loss: float


def read_load(chunks: Sequence[torch.nn.Module]) -> RoutingLoad | None:
    """`launch_load`, waited for."""
    return launch_load(chunks)()


def launch_load(chunks: Sequence[torch.nn.Module]) -> Callable[[], RoutingLoad | None]:
    """Sum over all ranks what their routers saw since the last call, and start anew; the sums are
    read by whoever calls what is returned.

    A collective over the whole world, to be called by every rank, with its model chunks. None for
    a dense model.
    """
    config = get_model_config(chunks[0])
    if not config.num_moe_experts:
        return lambda: None
    layers = config.num_layers + (config.mtp_num_layers or 0)
    device = backends.current().device
    counts = torch.zeros(layers, config.num_moe_experts, dtype=torch.int64, device=device)
    losses = torch.zeros(layers, 3, device=device)
    modules: Iterable[Any] = (module for chunk in chunks for module in chunk.modules())
    for module in modules:
        load = getattr(module, "load", None)
        if isinstance(load, LayerLoad):
            counts[module.layer_number - 1] += load.counts
            losses[module.layer_number - 1] += load.losses
            load.clear()
    for values in (counts, losses):
        dist.all_reduce(values)
    read_counts, read_losses = read_later(counts), read_later(losses)
    return lambda: _load(read_counts(), read_losses(), config.moe)


def _load(counts: torch.Tensor, losses: torch.Tensor, moe: MoEConfig) -> RoutingLoad:
    """From sums by layer on the host: choices, and those of `LayerLoad.losses`."""
    present = [layer for layer in range(len(losses)) if losses[layer, 2] > 0]
    means = losses[present, :2].sum(dim=0) / losses[present, 2].sum().clamp(min=1)
    return RoutingLoad(
        {layer + 1: counts[layer] for layer in present},
        aux_loss=means[0].item() / (moe.aux_loss_coefficient or 1.0),
        z_loss=means[1].item() / (moe.z_loss_coefficient or 1.0),
    )


def read_expert_bias(chunks: Sequence[torch.nn.Module]) -> dict[int, list[float]]:
    """The balancing bias of every expert, by layer (numbered as in `RoutingLoad`); {} without one.

    A collective over the whole world.
    """
    config = get_model_config(chunks[0])
    if not config.num_moe_experts or not config.moe.expert_bias:
        return {}
    layers = config.num_layers + (config.mtp_num_layers or 0)
    # Each rank's copies, and how many they are.
    total = torch.zeros(layers, config.num_moe_experts + 1, device=backends.current().device)
    modules: Iterable[Any] = (module for chunk in chunks for module in chunk.modules())
    for module in modules:
        if isinstance(getattr(module, "load", None), LayerLoad):
            total[module.layer_number - 1, :-1] += module.expert_bias
            total[module.layer_number - 1, -1] += 1
    dist.all_reduce(total)
    return {
        layer + 1: (values[:-1] / values[-1]).tolist()
        for layer, values in enumerate(total.cpu())
        if values[-1] > 0
    }


def imbalance_score(counts_E: torch.Tensor, devices: int, top_k: int) -> float:
    """The paper's IS (arXiv 2505.21411, eq. 2): (max − min over devices of their token–expert
    pairs) / tokens, with equal, contiguous shares of the experts. 0 without tokens."""
    pairs = counts_E.view(devices, -1).sum(dim=1)
    tokens = counts_E.sum().item() / top_k
    return (pairs.max() - pairs.min()).item() / tokens if tokens else 0.0


def device_imbalance(counts: dict[int, torch.Tensor], devices: int, top_k: int) -> float:
    """Mean IS of the layers over the expert-parallel ranks: exactly 0 for MoGE whenever they hold
    whole groups."""
    return _mean(imbalance_score(layer, devices, top_k) for layer in counts.values())


def expert_imbalance(counts: dict[int, torch.Tensor], top_k: int) -> float:
    """Mean IS of the layers with every expert a device of its own."""
    return _mean(imbalance_score(layer, layer.numel(), top_k) for layer in counts.values())


def dead_experts(counts: dict[int, torch.Tensor]) -> dict[int, list[int]]:
    """Experts that no token chose, by layer; layers without any are left out."""
    dead = {layer: (values == 0).nonzero().flatten().tolist() for layer, values in counts.items()}
    return {layer: experts for layer, experts in dead.items() if experts}


def dropped_tokens(counts: dict[int, torch.Tensor], tokens: int, top_k: int) -> int:
    """Choices of `tokens` tokens that no expert computed, over all layers: 0 unless
    `moe.capacity_factor` lets experts be full."""
    return sum(tokens * top_k - int(layer.sum()) for layer in counts.values())


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
