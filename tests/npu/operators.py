"""CPU kernels for the operators of torch-npu that this project calls, and for those that its
autograd calls for them; registered when imported. Arguments are named as in the schemas."""

from __future__ import annotations

from typing import Any

import torch

from pangu.ops.attention import visible
from pangu.ops.grouped_matmul import Loop
from pangu.ops.weight_gradient import weight_gradient_reference

Tensor = torch.Tensor
LAYOUTS: set[str] = set()  # of attention, that were asked for


def npu_grouped_matmul(
    x: Any, weight: Any, *, group_list: Any, split_item: int, group_type: int, **rest: Any
) -> list[Tensor]:
    assert (split_item, rest["group_list_type"], group_list.dtype) == (3, 1, torch.int64)
    assert group_list.numel() > 1  # counts of one group are refused
    if group_type == 0:
        return [Loop.rows(x[0], weight[0], group_list)]
    assert group_type == 2
    made = Loop.weights(x[0].t(), weight[0], group_list)
    made[group_list == 0] = float("nan")  # perhaps: no documentation says
    return [made]


def npu_grouped_matmul_add_(
    total: Tensor, x: Tensor, weight: Tensor, group_list: Tensor, **rest: Any
) -> Tensor:
    """Sums in float32; groups by their ends, whatever `group_list_type` says."""
    assert (x.dtype, total.dtype, group_list.dtype) == (weight.dtype, torch.float32, torch.int64)
    assert x.dtype in (torch.bfloat16, torch.float16)
    counts = group_list.diff(prepend=group_list.new_zeros(1))
    return total.copy_(weight_gradient_reference(total, x, weight, counts))


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


def npu_format_cast(x: Tensor, acl_format: int, *_: Any) -> Tensor:
    return x  # there is one format


def npu_gather_backward(grad: Tensor, size: Any, dim: int, index: Tensor, *_: Any) -> Tensor:
    return grad.new_zeros(size).scatter_add_(dim, index, grad)


def _scores(query: Tensor, key: Tensor, scale: float, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of every head, and scores in float32."""
    keys = key.repeat_interleave(query.size(1) // key.size(1), 1)
    scores = (query @ keys.transpose(2, 3) * scale).float()
    return keys, scores.masked_fill(hidden, float("-inf"))


def _hidden(mask: Tensor, mode: int, queries: int, keys: int) -> Tensor:
    """Of sparse modes 1, where a mask is given, and 3, where a triangle of 2048 stands for it."""
    if mode == 1:
        return mask
    assert mode == 3
    assert torch.equal(mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    return ~visible(queries, keys, None, mask.device)


def _each(tensors: Any, named: dict[str, Any]) -> Any:
    """Of rows `[T, N, …]`, each sequence's as `[1, N, S, …]`."""
    ends = named["actual_seq_qlen"]
    assert ends == named["actual_seq_kvlen"]
    assert ends[-1] == len(tensors[0])
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    parts = [each.transpose(0, 1)[None].split(sizes, 2) for each in tensors]
    return zip(*parts, strict=True)


def _rows(parts: Any) -> Tensor:
    """The reverse."""
    return torch.cat(list(parts), 2)[0].transpose(0, 1).contiguous()


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, layout: str, *rest: Any, **named: Any
) -> tuple[Any, ...]:
    if rest:  # of torch-npu's own autograd: in the order of the schema
        names = ("pse", "padding_mask", "atten_mask", "scale", "keep_prob", "pre_tockens")
        names += ("next_tockens", "inner_precise", "prefix", "actual_seq_qlen")
        names += ("actual_seq_kvlen", "sparse_mode")
        named = dict(zip(names, rest, strict=False)) | named
    LAYOUTS.add(layout)
    if layout == "TND":
        each = [_attended(*parts, heads, named)[:3] for parts in _each((query, key, value), named)]
        return *(_rows(parts) for parts in zip(*each, strict=True)), query.new_empty(0), 0, 0, 0
    assert layout == "BNSD"
    return *_attended(query, key, value, heads, named), query.new_empty(0), 0, 0, 0


def _attended(
    query: Tensor, key: Tensor, value: Tensor, heads: int, named: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = _hidden(named["atten_mask"], named["sparse_mode"], query.size(2), key.size(2))
    _, scores = _scores(query, key, named["scale"], hidden)
    most = scores.amax(-1, keepdim=True)
    weights = (scores - most).exp()
    total = weights.sum(-1, keepdim=True)
    values = value.repeat_interleave(heads // value.size(1), 1)
    out = (weights / total).to(value.dtype) @ values
    eight = (*scores.shape[:3], 8)  # as the operator lays them out
    return out, most.expand(eight).contiguous(), total.expand(eight).contiguous()


def npu_fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, heads: int, layout: str, **named: Any
) -> tuple[Tensor, ...]:
    given = (query, key, value, dy, named["softmax_max"], named["softmax_sum"])
    nothing = (query.new_empty(0), query.new_empty(0))
    if layout == "TND":
        each = [_attended_back(*parts, heads, named) for parts in _each(given, named)]
        return *(_rows(parts) for parts in zip(*each, strict=True)), *nothing
    return *_attended_back(*given, heads, named), *nothing


def _attended_back(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    most: Tensor,
    total: Tensor,
    heads: int,
    named: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    scale, groups = named["scale_value"], (key.size(1), heads // key.size(1))
    hidden = _hidden(named["atten_mask"], named["sparse_mode"], query.size(2), key.size(2))
    keys, scores = _scores(query, key, scale, hidden)
    weights = ((scores - most[..., :1]).exp() / total[..., :1]).to(value.dtype)
    back = dy @ value.repeat_interleave(groups[1], 1).transpose(2, 3)
    inner = weights * (back - (back * weights).sum(-1, keepdim=True)) * scale
    dk = (inner.transpose(2, 3) @ query).unflatten(1, groups).sum(2)
    dv = (weights.transpose(2, 3) @ dy).unflatten(1, groups).sum(2)
    return inner @ keys, dk, dv


LIBRARY = torch.library.Library("npu", "IMPL")
for name, function in list(globals().items()):
    if name.startswith(("npu_", "_npu_")):
        LIBRARY.impl(name, function, "CPU")
