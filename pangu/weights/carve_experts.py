"""CMoE's carving inside the experts of an MoE (arXiv 2502.04416): every expert's neurons become
parts, of which some serve all tokens of the expert and some are chosen (`pangu.moe.parts`).

Shapes: T tokens, K marks of a token, E experts, P parts of each, R of them chosen from, F width of
an expert, M of a part, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel

from configs.schema import Config
from pangu.checkpoint.tensor_files import Source, WeightsError
from pangu.inference.forward import until_enough
from pangu.inference.likelihood import windows
from pangu.moe.experts import GroupedExperts
from pangu.ops.grouped_matmul import grouped_matmul
from pangu.ops.swiglu import swiglu
from pangu.weights.carve import MARKS, Carving, Named, Parts, rewritten

_EXPERTS = re.compile(r"(decoder\.layers\.\d+\.mlp\.)experts\.w([12])")


def carved_config(config: Config, parts: Parts) -> Config:
    """The model with experts in parts.

    Raises:
        WeightsError: there is no such model.
    """
    model, moe = config.model, config.moe
    if moe.score_function == "gated" or moe.expert_parts:
        raise WeightsError("the model's experts are carved already")
    if moe.router in ("expert_choice", "forced_balance") or model.mtp_num_layers:
        raise WeightsError(
            "carving takes apart experts that tokens choose, and no layers of multi-token "
            f"prediction: moe.router={moe.router}, model.mtp_num_layers={model.mtp_num_layers}"
        )
    if parts.groups > 1:
        raise WeightsError("--groups: the parts of an expert are one group")
    width, rest = divmod(model.moe_ffn_hidden_size, parts.all)
    if rest:
        reason = f"{model.moe_ffn_hidden_size} neurons do not fall into {parts.all} equal parts"
        raise WeightsError(f"--experts: {reason}")
    count = model.num_experts * parts.all
    return replace(
        config,
        model=replace(model, num_experts=count, moe_ffn_hidden_size=width),
        moe=replace(
            moe,
            top_k=moe.top_k * (parts.shared + parts.active),
            expert_parts=parts.all,
            shared_parts=parts.shared,
            active_parts=parts.active,
        ),
    )


def marks(
    model: GPTModel,
    ids: Sequence[int],
    window: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, list[np.ndarray]]:
    """The neurons of largest activation of every token that an expert has, int32 `[T, K]`, for each
    expert, by the prefix of the layer's MLP."""
    found: dict[str, list[list[np.ndarray]]] = {}

    def note(prefix: str, module: GroupedExperts, args: tuple) -> None:
        rows, counts, weights = args
        inner = grouped_matmul(rows, module.w1.flatten(2), counts, parameter=module.w1)
        h = swiglu(inner.detach(), torch.ones_like(weights))
        largest = h.abs().topk(min(MARKS, h.size(-1)), sorted=False).indices
        each = largest.to(torch.int32).cpu().split(counts.tolist())
        kept = found.setdefault(prefix, [[] for _ in each])
        for marks_TK, expert in zip(each, kept, strict=True):
            expert.append(marks_TK.numpy())

    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: note(name.removesuffix("experts"), module, args)
        )
        for name, module in model.named_modules()
        if isinstance(module, GroupedExperts)
    ]
    try:
        for part in progress(windows(ids, window)):
            until_enough(model, torch.tensor([part]))
    finally:
        for handle in handles:
            handle.remove()
    return {name: [np.concatenate(expert) for expert in kept] for name, kept in found.items()}


def carved_tensors(source: Source, carvings: Mapping[str, Sequence[Carving]]) -> Iterator[Named]:
    """Every tensor of the carved model; `carvings` are those of a layer's experts, by the prefix of
    its MLP (`decoder.layers.3.mlp.`)."""
    return rewritten(source, _EXPERTS, carvings, (_carved_first, _carved_second))


def _order(carving: Carving) -> torch.Tensor:
    """All neurons of an expert `[F]`, those of its shared parts first."""
    return torch.from_numpy(np.concatenate([carving.shared, carving.experts.ravel()]))


def _carved_first(
    prefix: str, w1_EH2F: torch.Tensor, carvings: Sequence[Carving]
) -> Iterator[Named]:
    """`w1` `[E, H, 2, F]` as `[E·P, H, 2, M]`, and the rows `[E·R, H]` that speak for parts."""
    width = carvings[0].experts.shape[1]
    parts, speakers = [], []
    for w1_H2F, carving in zip(w1_EH2F, carvings, strict=True):
        ordered_H2PM = w1_H2F[..., _order(carving)].unflatten(-1, (-1, width))
        parts.append(ordered_H2PM.permute(2, 0, 1, 3))
        speakers.append(w1_H2F[..., torch.from_numpy(carving.speakers)].permute(1, 2, 0))
    yield f"{prefix}experts.w1", torch.cat(parts).contiguous()
    gate_RH, up_RH = torch.cat(speakers, dim=1)
    yield f"{prefix}router.parts.weight", gate_RH.contiguous()
    yield f"{prefix}router.parts.up_weight", up_RH.contiguous()
    yield f"{prefix}router.parts.scale", torch.zeros(len(gate_RH), dtype=w1_EH2F.dtype)


def _carved_second(
    prefix: str, w2_EFH: torch.Tensor, carvings: Sequence[Carving]
) -> Iterator[Named]:
    """`w2` `[E, F, H]` as `[E·P, M, H]`."""
    width = carvings[0].experts.shape[1]
    ordered = [
        w2_FH[_order(carving)].unflatten(0, (-1, width))
        for w2_FH, carving in zip(w2_EFH, carvings, strict=True)
    ]
    yield f"{prefix}experts.w2", torch.cat(ordered).contiguous()
