"""Core attention through `scaled_dot_product_attention`, with context parallelism by all-to-all.

Shapes use s = sequence (of this context-parallel rank), b = batch, n = heads of this
tensor-parallel rank, g = KV heads likewise, d = head size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from configs.schema import ModelConfig
from pangu import backends
from pangu.ops.attention import attention
from pangu.ops.rounded_cache import round_cached, round_channels


class CachedKeys(Protocol):
    """Given to the model in place of an attention mask: what decides which keys a query sees.

    The model's input is then one row of tokens, of several sequences one after the other; each
    layer's keys and values are kept, and queries see all that their own sequence has kept.
    """

    rows: torch.Tensor  # `[r]`, the tokens whose logits are wanted
    hidden: torch.Tensor | None  # `[s, 1, H]`, set by the model: what the logits are made from

    def turns(self, angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a pass's rotary angles `[s, 1, 1, d]`, made once for all layers: cosines, and sines
        whose first half is negative, `[s, 1, 1, 1, d]`."""
        ...

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """query `[s, 1, n, d]`, key `[s, 1, g, d]`, value `[s, 1, g, dv]` → `[s, 1, n, dv]`."""
        ...

    def attend_latents(
        self, layer: int, query: torch.Tensor, latents: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query `[s, 1, n, d]`, latents `[s, 1, 1, d]`, which are keys and values of all heads →
        `[s, 1, n, d]`."""
        ...


class CoreAttention(MegatronModule):
    """softmax(QKᵀ)V for megatron-core's attention modules (GQA and MLA).

    `attention_mask` carries document ids `[b, full sequence]` (int) when attention must stay
    inside documents, or the keys of a cache; otherwise None, and the mask is causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        head_size = k_channels or config.kv_channels
        self.scale = softmax_scale or 1.0 / math.sqrt(head_size)
        self.cp_group: dist.ProcessGroup = pg_collection.cp
        model: ModelConfig | None = getattr(config, "model", None)
        if model:  # of query and key
            self.scale *= model.rope_attention_factor**2
        self.kv_bits = model.kv_bits if model else 0
        self.key_rounding = model.key_rounding if model else "token"

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | CachedKeys | None = None,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query `[s, b, n, d]`, key `[s, b, g, d]`, value `[s, b, g, dv]` → `[s, b, n * dv]`."""
        key, value = round_cached(key, value, self.kv_bits, self.key_rounding)
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            cached = attention_mask.attend(self.layer_number, query, key, value, self.scale)
            return cached.flatten(2)
        size = self.cp_group.size()
        if size > 1:
            query, key, value = (
                _gather_sequence(tensor, self.cp_group) for tensor in (query, key, value)
            )
        out = attention(query, key, value, scale=self.scale, document_ids=attention_mask)
        if size > 1:
            out = _split_sequence(out, self.cp_group)
        return out.flatten(2)


class RoundedKeysAttention(SelfAttention):
    """GQA whose keys are rounded before their rotation, channel by channel, between limits that
    came out of calibration.

    `key_low` and `key_step` `[KV heads of all ranks, d]` are whole on every rank; a step of 0
    leaves its channel alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shape = (self.config.num_query_groups, self.hidden_size_per_attention_head)
        for name in ("key_low", "key_step"):
            zeros = torch.zeros(shape, dtype=torch.float32, device=backends.current().device)
            self.register_buffer(name, zeros)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """The engine's, with keys `[s, b, g, d]` rounded."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        first = self.config.num_query_groups * self.tp_group.rank() // self.tp_group.size()
        part = slice(first, first + key.size(2))
        key = round_channels(
            key, self.key_low[part], self.key_step[part], self.config.model.kv_bits
        )
        return query, key, *rest


class LatentAttention(MLASelfAttention):
    """MLA whose projections down may be other linears than megatron-core's own, which alone it
    takes."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        down = ("linear_q_down_proj", "linear_kv_down_proj")
        plain = replace(submodules, **dict.fromkeys(down, ColumnParallelLinear))
        super().__init__(config, plain, *args, **kwargs)
        for name in down:
            kind, linear = getattr(submodules, name), getattr(self, name, None)
            if linear is not None and kind is not ColumnParallelLinear:
                size = (linear.input_size, linear.output_size)
                options = {"config": config, "init_method": config.init_method, "bias": False}
                options |= {"gather_output": False, "tp_group": linear.tp_group}
                setattr(self, name, kind(*size, **options))
        model: ModelConfig | None = getattr(config, "model", None)
        self._keeps_latents = (
            type(self.linear_kv_up_proj) is ColumnParallelLinear  # a matrix and nothing else
            and not config.sequence_parallel
            and not (model and model.kv_bits)  # which rounds keys and values
        )

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the engine's; over a cache (`CachedKeys`) keys and values are never made where that
        can be avoided: the cache has their latents."""
        cached = attention_mask is not None and not isinstance(attention_mask, torch.Tensor)
        if cached and self._keeps_latents:
            return self.linear_proj(self._over_latents(hidden_states, attention_mask))
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def _over_latents(self, hidden_states: torch.Tensor, cached: CachedKeys) -> torch.Tensor:
        """hidden_states `[s, 1, H]` → `[s, 1, n * v]`. DeepSeek-V2 (arXiv 2405.04434), section
        2.1.2: a head's key is W_UK·c, so that q·(W_UK·c) = (W_UKᵀ·q)·c, and its value W_UV·c, so
        that the sum of values is W_UV times that of latents."""
        self.cache_mla_latents = True  # the engine's word for: make no keys and values
        try:
            query, latents, *_ = self.get_query_key_value_tensors(
                hidden_states, inference_context=_ByPosition(len(hidden_states))
            )
        finally:
            self.cache_mla_latents = False
        config = self.config
        sizes = (config.qk_head_dim, config.v_head_dim)
        weight = self.linear_kv_up_proj.weight.unflatten(0, (-1, sum(sizes)))  # [n, d + v, rank]
        up_key, up_value = weight.split(sizes, dim=1)
        content, position = query.split((config.qk_head_dim, config.qk_pos_emb_head_dim), dim=-1)
        absorbed = torch.cat([torch.einsum("sbnd,ndr->sbnr", content, up_key), position], dim=-1)
        out = cached.attend_latents(
            self.layer_number, absorbed, latents[:, :, None], self.core_attention.scale
        )
        latent_sums = out[..., : config.kv_lora_rank]
        return torch.einsum("sbnr,nvr->sbnv", latent_sums, up_value).flatten(2)


class _ByPosition:
    """What megatron-core asks of a cache while it makes queries and latents: angles are those that
    it was given, one a token."""

    def __init__(self, tokens: int) -> None:
        self.max_sequence_length = tokens

    def is_static_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        return False  # or the engine would multiply weights that it has split before

    def apply_rotary_emb_query(
        self, x: torch.Tensor, angles: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        options.pop("cu_seqlens_q", None)
        return apply_rotary_pos_emb(x, angles, **options)

    apply_rotary_emb_key = apply_rotary_emb_query


def _zigzag(size: int, device: torch.device) -> torch.Tensor:
    """Where the chunks of the causal order lie in the concatenation of the ranks' parts.

    megatron-core gives rank r the chunks r and 2 * size - 1 - r of 2 * size.
    """
    order = [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]
    return torch.tensor(order, device=device).argsort()


def _gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`[s, b, h, d]` → `[s * size, b, h / size, d]`: all positions, in causal order, of a part of
    the heads. Fewer KV heads than ranks are repeated first."""
    size = group.size()
    if x.size(2) % size:
        x = x.repeat_interleave(size // math.gcd(x.size(2), size), dim=2)
    s, b, h, d = x.shape
    send = x.view(s, b, size, h // size, d).permute(2, 0, 1, 3, 4).reshape(size * s, b, -1, d)
    received = all_to_all(group, send.contiguous())
    chunks = received.view(2 * size, s // 2, b, h // size, d)
    return chunks.index_select(0, _zigzag(size, x.device)).view(size * s, b, h // size, d)


def _split_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The reverse: `[s * size, b, h / size, d]` → `[s, b, h, d]`."""
    size = group.size()
    total, b, h, d = x.shape
    s = total // size
    order = _zigzag(size, x.device).argsort()
    chunks = x.reshape(2 * size, s // 2, b, h, d).index_select(0, order)
    received = all_to_all(group, chunks.reshape(total, b, h, d).contiguous())
    return received.view(size, s, b, h, d).permute(1, 2, 0, 3, 4).reshape(s, b, size * h, d)
