"""CPU kernels for the operators of torch-npu that this project calls, and for those that its
autograd calls for them; registered when imported. Arguments are named as in the schemas."""

from __future__ import annotations

from typing import Any

import torch

from pangu.ops.grouped_matmul import Loop

Tensor = torch.Tensor


def npu_grouped_matmul(
    x: Any, weight: Any, *, group_list: Any, split_item: int, group_type: int, **rest: Any
) -> list[Tensor]:
    assert (split_item, rest["group_list_type"], group_list.dtype) == (3, 1, torch.int64)
    if group_type == 0:
        return [Loop.rows(x[0], weight[0], group_list)]
    assert group_type == 2
    return [Loop.weights(x[0].t(), weight[0], group_list)]


def npu_moe_token_permute(tokens: Tensor, indices: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    assert indices.dtype == torch.int32
    order = indices.flatten().argsort(stable=True)
    return tokens[order // indices.size(1)], order.argsort(stable=True).to(torch.int32)


def npu_moe_token_permute_grad_v2(
    grad: Tensor, sorted_indices: Tensor, tokens: int, dtype: Any, top_k: int, *_: Any
) -> Tensor:
    return grad[sorted_indices.long()].unflatten(0, (tokens, top_k)).sum(1)


def npu_moe_token_unpermute(rows: Tensor, sorted_indices: Tensor, probs: Any, *_: Any) -> Tensor:
    assert sorted_indices.dtype == torch.int32
    return (rows[sorted_indices.long()].unflatten(0, probs.shape) * probs[..., None]).sum(1)


def _npu_moe_token_unpermute(
    rows: Tensor, sorted_indices: Tensor, probs: Any, *_: Any
) -> tuple[Tensor, Tensor]:
    return npu_moe_token_unpermute(rows, sorted_indices, probs), rows.clone()


def npu_moe_token_unpermute_grad_v2(
    grad: Tensor, sorted_indices: Tensor, size: int, dtype: Any, probs: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    rows = rest[-1]  # permuted_tokens
    back = torch.empty_like(rows)
    back[sorted_indices.long()] = (grad[:, None] * probs[..., None]).flatten(0, 1)
    chosen = rows[sorted_indices.long()].unflatten(0, probs.shape)
    return back, (chosen * grad[:, None]).sum(-1)


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    gate, up = x.chunk(2, dim)
    return torch.nn.functional.silu(gate) * up


def npu_swiglu_backward(grad: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    gate, up = x.chunk(2, dim)
    part = torch.sigmoid(gate)
    return torch.cat([grad * up * part * (1 + gate * (1 - part)), grad * gate * part], dim)


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return x * factor * gamma, factor


def npu_rms_norm_backward(
    dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    normed, inner = x * rstd, dy * gamma
    dx = (inner - normed * (inner * normed).mean(-1, keepdim=True)) * rstd
    return dx, (dy * normed).flatten(0, -2).sum(0)


def npu_gather_backward(grad: Tensor, size: Any, dim: int, index: Tensor, *_: Any) -> Tensor:
    return grad.new_zeros(size).scatter_add_(dim, index, grad)


def _scores(query: Tensor, key: Tensor, scale: float, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of every head, and scores in float32."""
    keys = key.repeat_interleave(query.size(1) // key.size(1), 1)
    scores = (query @ keys.transpose(2, 3) * scale).float()
    return keys, scores.masked_fill(hidden, float("-inf"))


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, layout: str, *rest: Any, **named: Any
) -> tuple[Any, ...]:
    _, _, hidden, scale = rest[:4] if rest else (0, 0, named["atten_mask"], named["scale"])
    assert layout == "BNSD"
    _, scores = _scores(query, key, scale, hidden)
    most = scores.amax(-1, keepdim=True)
    weights = (scores - most).exp()
    total = weights.sum(-1, keepdim=True)
    values = value.repeat_interleave(heads // value.size(1), 1)
    out = (weights / total).to(value.dtype) @ values
    eight = (*scores.shape[:3], 8)  # as the operator lays them out
    most, total = most.expand(eight).contiguous(), total.expand(eight).contiguous()
    return out, most, total, query.new_empty(0), 0, 0, 0


def npu_fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, heads: int, layout: str, **named: Any
) -> tuple[Tensor, ...]:
    scale, groups = named["scale_value"], (key.size(1), heads // key.size(1))
    keys, scores = _scores(query, key, scale, named["atten_mask"])
    weights = (scores - named["softmax_max"][..., :1]).exp() / named["softmax_sum"][..., :1]
    weights = weights.to(value.dtype)
    back = dy @ value.repeat_interleave(groups[1], 1).transpose(2, 3)
    inner = weights * (back - (back * weights).sum(-1, keepdim=True)) * scale
    dk = (inner.transpose(2, 3) @ query).unflatten(1, groups).sum(2)
    dv = (weights.transpose(2, 3) @ dy).unflatten(1, groups).sum(2)
    return inner @ keys, dk, dv, query.new_empty(0), query.new_empty(0)


LIBRARY = torch.library.Library("npu", "IMPL")
for name, function in list(globals().items()):
    if name.startswith(("npu_", "_npu_")):
        LIBRARY.impl(name, function, "CPU")
