"""The modules of a transformer layer: dense or MoE, GQA or MLA."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from configs.schema import ModelConfig
from pangu.model.attention import CoreAttention, LatentAttention, RoundedKeysAttention
from pangu.model.cached_layer import CachedLayer
from pangu.model.norm import Norm, SandwichResidual
from pangu.model.patched_layer import PatchedLayer
from pangu.model.transformer_config import PanguTransformerConfig
from pangu.moe.layer import moe_layer_spec
from pangu.ops.lora_linear import LoraRow, column, row
from pangu.ops.rounded_linear import RoundedRow


class _WithBias:
    """An output projection with a bias in a model whose other layers have none (Pangu Pro)."""

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)  # type: ignore[call-arg] # of a linear


class BiasedRowParallelLinear(_WithBias, RowParallelLinear): ...


class RoundedBiasedRow(_WithBias, RoundedRow): ...


class AdaptedBiasedRow(_WithBias, LoraRow): ...


BIASED: dict[type, type] = {
    RowParallelLinear: BiasedRowParallelLinear,
    RoundedRow: RoundedBiasedRow,
    LoraRow: AdaptedBiasedRow,
}


class PanguSpecProvider(LocalSpecProvider):
    """megatron-core's plain modules with our norm and attention, for its MTP builder."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return Norm

    def core_attention(self) -> type:
        return CoreAttention


def layer_spec(config: PanguTransformerConfig, *, moe: bool, patched: bool = False) -> ModuleSpec:
    """One transformer layer, pre-norm, optionally with the sandwich's second norms and with a patch
    before it."""
    model = _model(config)
    return ModuleSpec(
        module=PatchedLayer if patched else CachedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=_mla(config) if model.attention == "mla" else _gqa(config),
            self_attn_bda=_residual(config, model.sandwich_attention_gain),
            pre_mlp_layernorm=Norm,
            mlp=moe_layer_spec(config) if moe else _dense_mlp(config),
            mlp_bda=_residual(config, model.sandwich_mlp_gain),
        ),
    )


def _model(config: PanguTransformerConfig) -> ModelConfig:
    assert config.model is not None, "PanguTransformerConfig.model is set by transformer_config()"
    return config.model


def _residual(config: PanguTransformerConfig, gain: float) -> Any:
    if not _model(config).sandwich_norm:
        return get_bias_dropout_add
    return ModuleSpec(module=SandwichResidual, params={"config": config, "gain": gain})


def _output_projection(config: PanguTransformerConfig) -> type:
    plain = row(config, "linear_proj")
    return BIASED[plain] if _model(config).add_attention_output_bias else plain


def _gqa(config: PanguTransformerConfig) -> ModuleSpec:
    model = _model(config)
    qk_norm = Norm if model.qk_layernorm else IdentityOp
    by_channel = model.kv_bits and model.key_rounding == "channel"
    return ModuleSpec(
        module=RoundedKeysAttention if by_channel else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column(config, "linear_qkv"),
            core_attention=CoreAttention,
            linear_proj=_output_projection(config),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _mla(config: PanguTransformerConfig) -> ModuleSpec:
    qk_norm = Norm if _model(config).qk_layernorm else IdentityOp
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column(config, "linear_q_proj"),
            linear_q_down_proj=column(config, "linear_q_down_proj"),
            linear_q_up_proj=column(config, "linear_q_up_proj"),
            linear_kv_down_proj=column(config, "linear_kv_down_proj"),
            linear_kv_up_proj=column(config, "linear_kv_up_proj"),
            core_attention=CoreAttention,
            linear_proj=_output_projection(config),
            q_layernorm=qk_norm,
            kv_layernorm=qk_norm,
        ),
    )


def _dense_mlp(config: PanguTransformerConfig) -> ModuleSpec:
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=column(config, "linear_fc1"), linear_fc2=row(config, "linear_fc2")
        ),
    )


def block_spec(
    config: PanguTransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one virtual pipeline stage of this rank."""
    model = _model(config)
    dense_layers = model.num_dense_layers if config.num_moe_experts else config.num_layers
    kinds = [
        (number >= dense_layers, number in model.patched_layers)
        for number in _layer_ids(config, vp_stage)
    ]
    specs = {(moe, patch): layer_spec(config, moe=moe, patched=patch) for moe, patch in set(kinds)}
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in kinds], layer_norm=Norm)


def _layer_ids(config: PanguTransformerConfig, vp_stage: int | None) -> list[int]:
    """Global numbers, from 0, of the layers of this stage."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)))


def mtp_spec(
    config: PanguTransformerConfig, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """megatron-core's multi-token prediction, or None for a model without."""
    if not config.mtp_num_layers:
        return None
    last = layer_spec(config, moe=bool(config.num_moe_experts))
    return get_gpt_mtp_block_spec_for_backend(
        config, TransformerBlockSubmodules([last]), PanguSpecProvider(), vp_stage=vp_stage
    )
