"""Exact parameter counts and model FLOPs of a configuration.

Every weight of a layer comes from one table of linear maps, which the operator and memory counts
read too, so that parameters, FLOPs and bytes cannot disagree. Arguments that describe a layout
(`tp`, `ep`, `etp`) may be numpy arrays; counts broadcast over them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from configs.schema import Config, ModelConfig, MoEConfig
from simulator.array import Array

LayerKind = Literal["dense", "moe"]


@dataclass(frozen=True)
class Linear:
    """One weight matrix `[outputs, inputs]` and how tensor parallelism cuts it.

    `column` cuts the outputs, `row` the inputs, `replicated` neither. `kv_outputs` of the outputs
    belong to key/value heads, of which a rank holds at least one (`kv_head` wide pairs).
    """

    name: str
    inputs: int
    outputs: int
    split: Literal["column", "row", "replicated"]
    bias: bool = False
    kv_outputs: int = 0
    kv_head: int = 0

    def local_inputs(self, tp: Array) -> Array:
        return self.inputs / tp if self.split == "row" else self.inputs

    def local_outputs(self, tp: Array) -> Array:
        if self.split != "column":
            return self.outputs
        kv = np.maximum(self.kv_outputs / tp, 2 * self.kv_head)
        return (self.outputs - self.kv_outputs) / tp + kv

    def matrix(self, tp: Array = 1) -> Array:
        """Elements of the matrix on one rank."""
        return self.local_inputs(tp) * self.local_outputs(tp)

    def parameters(self, tp: Array = 1) -> Array:
        """Elements of matrix and bias on one rank."""
        return self.matrix(tp) + (self.local_outputs(tp) if self.bias else 0)


def head_size(model: ModelConfig) -> int:
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def query_groups(model: ModelConfig) -> int:
    """Key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def qk_size(model: ModelConfig) -> int:
    """Width of one head's query and key."""
    if model.attention == "mla":
        return model.qk_head_dim + model.qk_pos_emb_head_dim
    return head_size(model)


def v_size(model: ModelConfig) -> int:
    """Width of one head's value."""
    return model.v_head_dim if model.attention == "mla" else head_size(model)


def attention_linears(model: ModelConfig) -> list[Linear]:
    """The matrices of self-attention, in the order of the forward pass."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    bias, out_bias = model.add_qkv_bias, model.add_attention_output_bias
    output = Linear("attention.proj", heads * v_size(model), hidden, "row", out_bias)
    if model.attention == "gqa":
        size, groups = head_size(model), query_groups(model)
        kv = 2 * groups * size
        return [
            Linear("attention.qkv", hidden, heads * size + kv, "column", bias, kv, size),
            output,
        ]
    query = heads * qk_size(model)
    keys_values = heads * (model.qk_head_dim + model.v_head_dim)
    compressed = model.kv_lora_rank + model.qk_pos_emb_head_dim
    if model.q_lora_rank:
        queries = [
            Linear("attention.q_down", hidden, model.q_lora_rank, "replicated"),
            Linear("attention.q_up", model.q_lora_rank, query, "column", bias),
        ]
    else:
        queries = [Linear("attention.q", hidden, query, "column", bias)]
    return [
        *queries,
        Linear("attention.kv_down", hidden, compressed, "replicated"),
        Linear("attention.kv_up", model.kv_lora_rank, keys_values, "column", bias),
        output,
    ]


def mlp_linears(model: ModelConfig, width: int, name: str = "mlp") -> list[Linear]:
    """The two matrices of an MLP of `width`; SwiGLU's gate and up projections are one matrix."""
    inner = 2 * width if model.activation == "swiglu" else width
    bias = model.add_mlp_bias
    return [
        Linear(f"{name}.fc1", model.hidden_size, inner, "column", bias),
        Linear(f"{name}.fc2", width, model.hidden_size, "row", bias),
    ]


# The trainer's names of linears that adapters stand beside (`model.lora_modules`).
_ADAPTED = {
    "attention.qkv": "linear_qkv",
    "attention.q": "linear_q_proj",
    "attention.q_down": "linear_q_down_proj",
    "attention.q_up": "linear_q_up_proj",
    "attention.kv_down": "linear_kv_down_proj",
    "attention.kv_up": "linear_kv_up_proj",
    "attention.proj": "linear_proj",
    "mlp.fc1": "linear_fc1",
    "mlp.fc2": "linear_fc2",
    "experts.fc1": "experts_fc1",
    "experts.fc2": "experts_fc2",
}


def adapters(model: ModelConfig, kind: LayerKind) -> list[tuple[Linear, Linear]]:
    """A and B of every adapter of a layer (LoRA), which are cut as the linear beside them: A by its
    inputs where that is, B by its outputs. Those of routed experts are `expert_adapters`."""
    width = model.ffn_hidden_size if kind == "dense" else model.shared_expert_ffn_hidden_size
    return _beside(model, attention_linears(model) + (mlp_linears(model, width) if width else []))


def expert_adapters(model: ModelConfig) -> list[tuple[Linear, Linear]]:
    """A and B of one routed expert's adapters, as they are multiplied; of all of them each
    expert-tensor-parallel rank keeps an equal part."""
    return _beside(model, mlp_linears(model, model.moe_ffn_hidden_size, "experts"))


def _beside(model: ModelConfig, linears: list[Linear]) -> list[tuple[Linear, Linear]]:
    if not model.lora_rank:
        return []
    return [
        (
            replace(
                linear,
                name=f"{linear.name}.lora_a",
                outputs=model.lora_rank,
                split="row" if linear.split == "row" else "replicated",
                bias=False,
            ),
            replace(
                linear,
                name=f"{linear.name}.lora_b",
                inputs=model.lora_rank,
                split="column" if linear.split == "column" else "replicated",
                bias=False,
            ),
        )
        for linear in linears
        if _ADAPTED[linear.name] in model.lora_modules
    ]


def norm_parameters(model: ModelConfig, width: int) -> int:
    return 2 * width if model.normalization == "LayerNorm" else width


def layer_norms(model: ModelConfig) -> int:
    """Parameters of all norms of a layer, none of which tensor parallelism cuts."""
    count = 4 if model.sandwich_norm else 2
    total = count * norm_parameters(model, model.hidden_size)
    if model.qk_layernorm and model.attention == "gqa":
        total += 2 * norm_parameters(model, head_size(model))
    elif model.qk_layernorm:
        ranks = (model.q_lora_rank, model.kv_lora_rank)
        total += sum(norm_parameters(model, rank) for rank in ranks if rank)
    return total


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one transformer layer on one rank, by part."""

    attention: Array
    norms: Array
    mlp: Array  # the MLP of a dense layer
    router: Array
    shared_experts: Array
    experts: Array  # routed experts held by the rank
    adapters: Array = 0
    expert_adapters: Array = 0  # of the routed experts held by the rank

    @property
    def dense(self) -> Array:
        """Everything whose gradients are reduced over the data-parallel group."""
        linears = self.attention + self.mlp + self.router + self.shared_experts
        return linears + self.norms + self.adapters

    @property
    def routed(self) -> Array:
        """Everything whose gradients are reduced over the expert-data-parallel group."""
        return self.experts + self.expert_adapters

    @property
    def total(self) -> Array:
        return self.dense + self.routed


def router_rows(model: ModelConfig, moe: MoEConfig) -> Array:
    """Rows `[hidden]` of all matrices of a router: one an expert, two where scores are gated; with
    parts one an expert, and two for each part that is chosen."""
    if moe.expert_parts:
        chosen = moe.expert_parts - moe.shared_parts
        return model.num_experts // moe.expert_parts * (1 + 2 * chosen)
    return model.num_experts * (2 if moe.score_function == "gated" else 1)


def router_scales(model: ModelConfig, moe: MoEConfig) -> Array:
    """Learned factors of a router: of experts, and of parts that are chosen."""
    whole = model.num_experts // (moe.expert_parts or 1)
    parts = whole * (moe.expert_parts - moe.shared_parts) if moe.expert_parts else 0
    return parts + (whole if moe.router_scale else 0)


def layer_parameters(
    model: ModelConfig,
    moe: MoEConfig,
    kind: LayerKind,
    tp: Array = 1,
    ep: Array = 1,
    etp: Array = 1,
) -> LayerParameters:
    """Parameters of a layer on one rank of `tp` × `ep` × `etp`."""
    attention = sum(linear.parameters(tp) for linear in attention_linears(model))
    norms = layer_norms(model)
    low = sum(one.parameters(tp) for pair in adapters(model, kind) for one in pair)
    if kind == "dense":
        mlp = sum(linear.parameters(tp) for linear in mlp_linears(model, model.ffn_hidden_size))
        return LayerParameters(attention, norms, mlp, 0, 0, 0, low)
    router = router_rows(model, moe) * model.hidden_size + router_scales(model, moe)
    shared: Array = 0
    if width := model.shared_expert_ffn_hidden_size:
        shared = sum(linear.parameters(tp) for linear in mlp_linears(model, width))
    expert = sum(linear.parameters(etp) for linear in mlp_linears(model, model.moe_ffn_hidden_size))
    experts = expert * model.num_experts / ep
    each = sum(one.parameters() for pair in expert_adapters(model) for one in pair)
    beside = each * model.num_experts / (ep * etp)
    return LayerParameters(attention, norms, 0, router, shared, experts, low, beside)


def layer_counts(model: ModelConfig) -> dict[LayerKind, int]:
    """How many layers of each kind the model has, without MTP."""
    dense = model.num_dense_layers if model.num_experts else model.num_layers
    return {"dense": dense, "moe": model.num_layers - dense}


def mtp_kind(model: ModelConfig) -> LayerKind:
    """The kind of transformer layer inside a multi-token-prediction module."""
    return "moe" if model.num_experts else "dense"


def mtp_projection(model: ModelConfig) -> Linear:
    """An MTP module's projection of [embedding, hidden] to hidden."""
    return Linear("mtp.projection", 2 * model.hidden_size, model.hidden_size, "column")


def mtp_extra(model: ModelConfig, tp: Array = 1) -> Array:
    """What an MTP module holds on one rank beside its transformer layer: the projection and
    three norms (of the embedding, of the hidden state, and before the head)."""
    return mtp_projection(model).parameters(tp) + 3 * norm_parameters(model, model.hidden_size)


def leap_head_parameters(model: ModelConfig, tp: Array = 1) -> Array:
    """What the leap heads beside the model's own hold on one rank: a square matrix with a bias,
    whole, and a head, cut over the vocabulary."""
    hidden, heads = model.hidden_size, max(0, model.leap_heads - 1)
    return heads * (hidden * hidden + hidden + hidden * model.vocab_size / np.asarray(tp))


def patch_linear(model: ModelConfig) -> Linear:
    """What leads the residual stream over pruned layers (`model.patched_layers`)."""
    return Linear("layer_patch", model.hidden_size, model.hidden_size, "replicated")


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part, of the whole model (`total`) or touched by one token (`active`).

    As published counts do, `total` and `active` count every vocabulary table of the model (one
    where embeddings are tied) and leave multi-token prediction out; `mtp` is reported apart and
    `allocated` is what a trainer holds. Leap heads beside the model's own count as `mtp`.
    """

    parts: dict[str, int]
    active_parts: dict[str, int]
    mtp: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        return sum(self.active_parts.values())

    @property
    def allocated(self) -> int:
        return self.total + self.mtp


def count_parameters(config: Config) -> ParameterCount:
    """Parameters of the model that `config` describes."""
    model, moe = config.model, config.moe
    table = model.vocab_size * model.hidden_size
    parts: dict[str, int] = {"embedding": table}
    if model.position_embedding == "learned":
        parts["position_embedding"] = model.max_position_embeddings * model.hidden_size
    if not model.tie_embeddings:
        parts["head"] = table
    parts["final_norm"] = norm_parameters(model, model.hidden_size)
    if model.patched_layers:
        parts["patches"] = len(model.patched_layers) * int(patch_linear(model).parameters())
    active = dict(parts)
    for kind, layers in layer_counts(model).items():
        if not layers:
            continue
        layer = layer_parameters(model, moe, kind)
        share = moe.top_k / model.num_experts if kind == "moe" else 0
        for part, value in vars(layer).items():
            if value:
                used = value * share if part in ("experts", "expert_adapters") else value
                parts[part] = parts.get(part, 0) + int(layers * value)
                active[part] = active.get(part, 0) + round(layers * used)
    mtp = 0
    if model.mtp_num_layers:
        layer = layer_parameters(model, moe, mtp_kind(model))
        mtp = model.mtp_num_layers * int(layer.total + mtp_extra(model))
    mtp += int(leap_head_parameters(model))
    return ParameterCount(parts, active, mtp)


def matmul_parameters_per_token(model: ModelConfig, moe: MoEConfig, kind: LayerKind) -> Array:
    """Matrix elements that one token meets in a layer."""
    matrices = sum(linear.matrix() for linear in attention_linears(model))
    if kind == "dense":
        return matrices + sum(x.matrix() for x in mlp_linears(model, model.ffn_hidden_size))
    matrices += router_rows(model, moe) * model.hidden_size
    if width := model.shared_expert_ffn_hidden_size:
        matrices += sum(x.matrix() for x in mlp_linears(model, width))
    expert = sum(x.matrix() for x in mlp_linears(model, model.moe_ffn_hidden_size))
    return matrices + moe.top_k * expert


def model_flops_per_token(
    config: Config, *, causal: bool = True, mtp: bool = True, seq_length: int | None = None
) -> float:
    """FLOPs of forward and backward per trained token: the numerator of MFU.

    6 FLOPs per active matrix element (the head is one, the embedding look-up is not), 4 of one
    that is frozen because adapters alone are trained, plus attention's two products. Recomputation
    is not counted. With `causal` (the convention used throughout) only the unmasked half of the
    scores counts: 3·s·heads·(d_qk + d_v) per layer; without it, as Megatron's and PaLM's formulas
    have it, twice that. `mtp` counts the
    multi-token-prediction modules and their use of the head.
    """
    model, moe = config.model, config.moe
    length = seq_length or config.train.seq_length
    scores = length * model.num_attention_heads * (qk_size(model) + v_size(model))
    attention = (3 if causal else 6) * scores
    head = model.vocab_size * model.hidden_size
    each = 4.0 if model.lora_rank else 6.0
    total = each * (head + len(model.patched_layers) * float(patch_linear(model).matrix()))
    for kind, layers in layer_counts(model).items():
        if layers:
            matrices = float(matmul_parameters_per_token(model, moe, kind))
            total += layers * (each * matrices + 6.0 * _low_rank(model, moe, kind) + attention)
    if mtp and model.leap_heads:
        total += each * (model.leap_heads - 1) * (head + model.hidden_size**2)
    if mtp and model.mtp_num_layers:
        matrices = float(matmul_parameters_per_token(model, moe, mtp_kind(model)))
        matrices += float(mtp_projection(model).matrix() + head)
        low = 6.0 * _low_rank(model, moe, mtp_kind(model))
        total += model.mtp_num_layers * (each * matrices + low + attention)
    return total


def _low_rank(model: ModelConfig, moe: MoEConfig, kind: LayerKind) -> float:
    """Elements of a layer's adapters that one token meets."""
    low = float(sum(one.matrix() for pair in adapters(model, kind) for one in pair))
    if kind == "dense":
        return low
    return low + moe.top_k * sum(
        float(one.matrix()) for pair in expert_adapters(model) for one in pair
    )
