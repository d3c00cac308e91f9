"""Which tensors of a transformer layer are whose, told to `Swap` by hooks on its modules."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer

from configs.schema import MemoryConfig
from pangu import backends
from pangu.moe.layer import ExpertLayer
from pangu.offload.swap import PerThread, Swap
from pangu.ops.attention import shared_masks

EXPERTS_ROWS = ("moe", "moe_permute")
ACTIVATED = ("moe", "moe_act", "moe_fc1")


def swap_activations(chunks: Iterable[torch.nn.Module], memory: MemoryConfig, folder: Path) -> Swap:
    """Let the modules of `memory.swap` keep their activations on the host tier; where that is a
    file, in `folder`."""
    chunks = list(chunks)
    again = memory.recompute_modules if memory.recompute_granularity == "selective" else []
    parameters = [each for chunk in chunks for each in chunk.parameters()]
    swap = Swap(backends.current().host_tier(folder), memory.swap, again, parameters)
    for mask in shared_masks():
        swap.own(mask)  # nobody's, and so it stays
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TransformerLayer):
                _attach(swap, module)
    return swap


def _attach(swap: Swap, layer: TransformerLayer) -> None:
    layer.self_attention.register_forward_pre_hook(lambda *_: swap.begin_layer())
    for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
        _around(swap, norm, "layernorm", before=("layernorm",), after=("layernorm",))
    for residual in (layer.self_attn_bda, layer.mlp_bda):
        if isinstance(residual, torch.nn.Module) and hasattr(residual, "norm"):
            _around(swap, residual.get_submodule("norm"), "layernorm", before=("layernorm",))
    attention, mlp = layer.self_attention, layer.mlp
    latent = isinstance(attention, MLASelfAttention)
    made = "mla_up_proj" if latent else "core_attn"
    _around(swap, attention, "", before=())
    core = attention.core_attention
    _around(swap, core, "core_attn", before=(made,), after=("core_attn",))
    if not isinstance(mlp, ExpertLayer):
        _around(swap, mlp, "mlp", before=())
    else:
        _around(swap, mlp, "moe", before=())
        if mlp.use_shared_expert:
            _around(swap, mlp.shared_experts, "shared_experts", before=())
        _around(swap, mlp.experts, "moe_fc1", before=EXPERTS_ROWS)
        mlp.experts.activate.register_forward_hook(
            lambda module, inputs, output: swap.own(output, *ACTIVATED)
        )


def _around(
    swap: Swap,
    module: torch.nn.Module,
    name: str,
    *,
    before: tuple[str, ...],
    after: tuple[str, ...] | None = None,
) -> None:
    """What is saved inside `module` is `name`'s; its inputs are of the owners `before`, unless
    somebody else's, its output `after`."""
    inside: PerThread[Any] = PerThread()

    def enter(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor):
                swap.own(tensor, *before)
        inside.entered.append(swap.inside(name))
        inside.entered[-1].__enter__()

    def leave(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        inside.entered.pop().__exit__(None, None, None)
        if after is not None and isinstance(output, torch.Tensor):
            swap.own(output, *after)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
