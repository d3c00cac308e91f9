"""Causal attention, optionally confined to documents. Reference, SDPA, NPU and fixed variants.

Shapes: s = query positions, t = key positions, b = batch, n = heads, g = KV heads (n a multiple
of g), d = head size of query and key, e = head size of value.
"""

from __future__ import annotations

import importlib
from functools import lru_cache

import torch
import torch.nn.functional as F

from pangu import backends

BY_LENGTH = ("npu",)  # variants that are told of documents by their lengths
# Of npu_fusion_attention: sequences of a call, and the side of the triangle that stands for any.
NPU_SEQUENCES = 1024
NPU_TRIANGLE = 2048


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    document_ids: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """query `[s, b, n, d]`, key `[t, b, g, d]`, value `[t, b, g, e]` → `[s, b, n, e]`.

    Query i sees keys up to t - s + i (t > s: the first keys come from a cache). `document_ids`
    `[b, t]` (any integer dtype, the same throughout a document, which is in one piece) hides keys
    of other documents; it lies on the host where `documents_stay_on_host`. `seen` bool `[s, t]`
    takes the place of both where it is given: what each query sees; or `[b, 1, s, t]`.
    """
    variants = {"sdpa": attention_sdpa, "npu": attention_npu, "fixed": attention_fixed}
    variant = variants[backends.current().operators.attention]
    return variant(query, key, value, scale=scale, document_ids=document_ids, seen=seen)


def attention_of_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """A single query that sees all keys: query `[1, 1, n, d]`, key `[g, t, d]`, value `[g, t, e]` →
    `[1, 1, n, e]`. While text is decoded there is one for each sequence and layer."""
    if backends.current().operators.attention != "sdpa" or key.size(2) != value.size(2):
        seq_first = (key.transpose(0, 1)[:, None], value.transpose(0, 1)[:, None])
        return attention(query, *seq_first, scale=scale)
    # The heads that share a key stand where several queries would.
    shared = query.view(1, key.size(0), -1, query.size(3))
    out = F.scaled_dot_product_attention(shared, key[None], value[None], scale=scale)
    return out.view(query.shape)


def attention_of_few(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """A few queries of each of several sequences: query `[b, s, n, d]`, key `[b, g, t, d]`, value
    `[b, g, t, e]`, bias `[b, 1, s, t]`, 0 where a query sees a key, else -inf → `[b, s, n, e]`."""
    if backends.current().operators.attention != "sdpa" or key.size(3) != value.size(3):
        seq_first = (x.permute(2, 0, 1, 3) for x in (key, value))
        out = attention(query.transpose(0, 1), *seq_first, scale=scale, seen=bias == 0)
        return out.transpose(0, 1)
    groups, repeat = key.size(1), query.size(2) // key.size(1)
    # The heads that share a key stand where further queries would.
    shared = query.unflatten(2, (groups, repeat)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if query.size(1) > 1:
        bias = bias.repeat(1, 1, repeat, 1)
    out = F.scaled_dot_product_attention(shared, key, value, attn_mask=bias, scale=scale)
    return out.unflatten(2, (repeat, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def visible(
    queries: int, keys: int, document_ids: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Which keys a query sees: bool `[1 or b, 1, s, t]`."""
    row = torch.arange(keys - queries, keys, device=device)
    column = torch.arange(keys, device=device)
    mask = (column[None, :] <= row[:, None])[None, None]
    if document_ids is not None:
        same = document_ids[:, keys - queries :, None] == document_ids[:, None, :]
        mask = mask & same[:, None]
    return mask


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    document_ids: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every score, in the open."""
    repeat = query.size(2) // key.size(2)
    key, value = key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    mask = visible(query.size(0), key.size(0), document_ids, query.device) if seen is None else seen
    probs = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bnst,tbne->sbne", probs, value)


def _as_wide(value: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Values filled up with zeros to the query's head size: fused kernels want one (MLA: two)."""
    missing = query.size(3) - value.size(3)
    return F.pad(value, (0, missing)) if missing else value


def attention_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    document_ids: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch's fused attention (flash on CPU and CUDA)."""
    queries, keys = query.size(0), key.size(0)
    causal = queries == keys and document_ids is None and seen is None
    mask = seen
    if mask is None and not causal and (queries > 1 or document_ids is not None):
        mask = visible(queries, keys, document_ids, query.device)
    width = value.size(3)
    value = _as_wide(value, query)
    out = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.size(2) != key.size(2),
    )
    return out[..., :width].permute(2, 0, 1, 3)


def attention_npu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    document_ids: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch-npu's fused attention: documents by their lengths (layout TND), without a score between
    two of them; all else in layout BNSD. Not run on an NPU."""
    width = value.size(3)
    value = _as_wide(value, query)
    queries, keys = query.size(0), key.size(0)
    if document_ids is not None and seen is None and queries == keys:
        ends = document_ends(document_ids)
        if len(ends) <= NPU_SEQUENCES:
            return _npu_sequences(query, key, value, scale, ends)[..., :width]
    if document_ids is None and seen is None:
        hidden, mode = _npu_triangle(query.device), 3  # the lower right triangle, of any size
    else:
        ids = None if document_ids is None else document_ids.to(query.device)
        shown = visible(queries, keys, ids, query.device) if seen is None else seen
        shown = shown.reshape(-1, 1, queries, keys)
        hidden, mode = ~shown, 1  # every position's own
    import torch_npu

    out = torch_npu.npu_fusion_attention(
        query.permute(1, 2, 0, 3).contiguous(),
        key.permute(1, 2, 0, 3).contiguous(),
        value.permute(1, 2, 0, 3).contiguous(),
        query.size(2),
        "BNSD",
        atten_mask=hidden,
        scale=scale,
        sparse_mode=mode,
    )[0]
    return out[..., :width].permute(2, 0, 1, 3)


def _npu_sequences(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, ends: list[int]
) -> torch.Tensor:
    """Sequences one after the other, which end where `ends` says."""
    import torch_npu

    seq, batch = query.shape[:2]
    rows = [each.transpose(0, 1).flatten(0, 1).contiguous() for each in (query, key, value)]
    out = torch_npu.npu_fusion_attention(
        *rows,
        query.size(2),
        "TND",
        atten_mask=_npu_triangle(query.device),
        scale=scale,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=3,
    )[0]
    return out.unflatten(0, (batch, seq)).transpose(0, 1)


@lru_cache(maxsize=1)
def _npu_triangle(device: torch.device) -> torch.Tensor:
    """What the operator takes for a causal mask of any size; True is hidden."""
    with torch.inference_mode(False):  # or no backward pass could keep it
        return torch.ones(NPU_TRIANGLE, NPU_TRIANGLE, dtype=torch.bool, device=device).triu_(1)


def shared_masks() -> list[torch.Tensor]:
    """What all calls have in common: there for good, whoever saves it for a backward pass."""
    backend = backends.current()
    return [_npu_triangle(backend.device)] if backend.operators.attention in BY_LENGTH else []


def document_ends(document_ids: torch.Tensor) -> list[int]:
    """Where each document ends, in sequences `[b, t]` one after the other: b · t is the last. For
    the host, which waits for a device that has the ids (see `documents_stay_on_host`)."""
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts: list[int] = first.flatten().nonzero().flatten().tolist()
    return [*starts[1:], document_ids.numel()]


def documents_stay_on_host() -> bool:
    """Whether a batch's document ids are best left there: lengths are the host's to say, masks are
    made on the device."""
    return backends.current().operators.attention in BY_LENGTH


def attention_fixed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    document_ids: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every query goes through its keys in the same order, however many are beside it; without
    gradients. Documents, and heads too wide for a kernel's registers (MLA's latents), in the open:
    there a query's sums depend on how many keys its chunk has."""
    kernels = importlib.import_module("pangu.ops.kernels.fixed_attention")
    found = []
    for i in range(query.size(1)):  # each sequence by itself
        q, k, v = (each[:, i : i + 1] for each in (query, key, value))
        own = seen if seen is None or seen.dim() == 2 else seen[i, 0]
        if document_ids is not None or query.size(3) > kernels.WIDEST:
            ids = None if document_ids is None else document_ids[i : i + 1]
            found.append(attention_reference(q, k, v, scale=scale, document_ids=ids, seen=own))
        else:
            found.append(kernels.attention(q[:, 0], k[:, 0], v[:, 0], scale, own)[:, None])
    return torch.cat(found, dim=1)
