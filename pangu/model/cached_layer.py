"""A transformer layer that decodes over a cache in few operations.

Where a pass has a few tokens, megatron-core's modules, which are made for gradients and many ranks,
take about as long around the products as these do on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from pangu.model.attention import CachedKeys
from pangu.ops.dense_mlp import dense_mlp, is_plain
from pangu.ops.linear import linear


class CachedLayer(TransformerLayer):
    """The engine's layer. Over a cache (`CachedKeys`), without gradients or tensor parallelism,
    what is plain in it is computed here: grouped-query attention and a dense MLP whose linears are
    matrices and nothing else. Experts and all other modules are called as ever."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the engine's: hidden_states `[s, 1, H]` over a cache."""
        cached = attention_mask is not None and not isinstance(attention_mask, torch.Tensor)
        angles = kwargs.get("rotary_pos_emb")
        if not cached or torch.is_grad_enabled() or args or not self._attends_plainly(angles):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        attended = self._attended(self.input_layernorm(hidden_states), attention_mask, angles)
        bias = self.self_attention.linear_proj.bias
        hidden_states = self._added(self.self_attn_bda, (attended, bias), hidden_states)
        normed = self.pre_mlp_layernorm(hidden_states)
        plain = type(self.mlp) is MLP and is_plain(self.mlp)
        made = dense_mlp(self.mlp, normed) if plain else self.mlp(normed)
        return self._added(self.mlp_bda, made, hidden_states), None

    def _attends_plainly(self, angles: torch.Tensor | None) -> bool:
        attention = self.self_attention
        return (
            type(attention) is SelfAttention
            and type(attention.linear_qkv) is ColumnParallelLinear
            and type(attention.linear_proj).forward is RowParallelLinear.forward
            and self.config.tensor_model_parallel_size == 1
            and not attention.core_attention.kv_bits
            and not self.config.rotary_interleaved
            and (angles is None or angles.size(-1) == attention.hidden_size_per_attention_head)
        )

    def _attended(
        self, normed: torch.Tensor, cached: CachedKeys, angles: torch.Tensor | None
    ) -> torch.Tensor:
        """`[s, 1, H]` to the same, before the projection's bias."""
        attention, into = self.self_attention, self.self_attention.linear_qkv
        groups, size = (
            attention.num_query_groups_per_partition,
            attention.hidden_size_per_attention_head,
        )
        mixed = linear(normed, into.weight, into.bias)
        mixed = mixed.view(*mixed.shape[:2], groups, -1, size)  # a group's queries, key and value
        turned, value = mixed[:, :, :, :-1], mixed[:, :, :, -1]
        if attention.q_layernorm is not None:
            query = attention.q_layernorm(turned[:, :, :, :-1])
            turned = torch.cat([query, attention.k_layernorm(turned[:, :, :, -1:])], dim=3)
        if angles is not None:
            cos, sin = cached.turns(angles, turned.dtype)
            turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
        query, key = turned[:, :, :, :-1].flatten(2, 3), turned[:, :, :, -1]
        core = attention.core_attention
        out = cached.attend(core.layer_number, query, key, value, core.scale)
        return linear(out.flatten(2), attention.linear_proj.weight)

    def _added(
        self, add: Any, made: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor
    ) -> torch.Tensor:
        if add is not get_bias_dropout_add:  # a second norm
            return add(self.training, False)(made, residual, 0.0)
        out, bias = made
        return residual + (out if bias is None else out + bias)
