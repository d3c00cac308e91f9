"""QuaRot's rotation (arXiv 2404.00456, section 4) of a whole model, tensor by tensor: outliers of a
few channels are spread over all of them, and the float model computes what it did.

The residual stream x becomes x·Q with Q = diag(±1)·H and H an orthonormal Hadamard matrix: gains of
norms go into the matrices behind them, for only without gains a norm commutes with Q; a matrix that
reads the stream is turned in its columns, one that writes it in its rows. With GQA the values of
each head are turned too, in the projections before and behind the attention. All of it is in the
weights. What QuaRot does while the model runs, a Hadamard transform before the down-projection, is
not here; that of keys is what `--keys token` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from configs.schema import Config
from pangu.checkpoint.tensor_files import Source, WeightsError
from pangu.weights.hadamard import hadamard

Tensor = torch.Tensor
_LAYER = re.compile(r"(decoder\.layers\.\d+\.)(.*)")
# Matrices that read the stream behind a norm, with their inputs in dimension 1.
_READERS = {
    "self_attention.linear_qkv.weight": "input_layernorm.weight",
    "self_attention.linear_q_proj.weight": "input_layernorm.weight",
    "self_attention.linear_q_down_proj.weight": "input_layernorm.weight",
    "self_attention.linear_kv_down_proj.weight": "input_layernorm.weight",
    "mlp.linear_fc1.weight": "pre_mlp_layernorm.weight",
    "mlp.shared_experts.linear_fc1.weight": "pre_mlp_layernorm.weight",
    "mlp.router.weight": "pre_mlp_layernorm.weight",
    "mlp.router.up_weight": "pre_mlp_layernorm.weight",
    "mlp.router.parts.weight": "pre_mlp_layernorm.weight",
    "mlp.router.parts.up_weight": "pre_mlp_layernorm.weight",
    "mlp.experts.w1": "pre_mlp_layernorm.weight",
}
# What is added to the stream, and the dimension of its outputs.
_WRITERS = {
    "self_attention.linear_proj.weight": 0,
    "self_attention.linear_proj.bias": 0,
    "mlp.linear_fc2.weight": 0,
    "mlp.linear_fc2.bias": 0,
    "mlp.shared_experts.linear_fc2.weight": 0,
    "mlp.experts.w2": 2,
}
_UNTOUCHED = (
    "linear_qkv.bias", "linear_fc1.bias", "linear_q_up_proj.weight", "linear_kv_up_proj.weight",
    "q_layernorm.weight", "k_layernorm.weight", "kv_layernorm.weight", "router.expert_bias",
    "router.router_scale", "router.parts.scale", "self_attention.key_low",
    "self_attention.key_step",
)  # fmt: skip


def rotated_config(config: Config) -> Config:
    """The model after it: the head has the last norm's gain in it, and an embedding of its own.

    Raises:
        WeightsError: the model has no such rotation.
    """
    model = config.model
    if model.normalization != "RMSNorm" or model.sandwich_norm or model.mtp_num_layers:
        raise WeightsError(
            "--rotate: gains go into what follows a norm, which serves RMSNorm alone, without "
            "sandwich norms and multi-token prediction"
        )
    return replace(config, model=replace(model, tie_embeddings=False))


def rotated_tensors(config: Config, source: Source, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the rotated model; `config` is that of the model in `source`. `seed` draws
    the signs. Products are made in float64 and stored as before.

    Raises:
        WeightsError: there is no Hadamard matrix of the hidden or the head size, or the model has
            a tensor that this file does not know.
    """
    rotated_config(config)
    names = set(source.names())
    turn, head = _hadamard(config.model.hidden_size), _head_turn(config)
    signs = torch.randint(2, (len(turn), 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    turn = signs * turn
    for name in source.names():
        weight = source.read(name)
        yield name, _rotated(name, weight.double(), source, turn, head).to(weight.dtype)
    if "output_layer.weight" not in names:
        weight = source.read("embedding.word_embeddings.weight")
        whole = _rotated("output_layer.weight", weight.double(), source, turn, head)
        yield "output_layer.weight", whole.to(weight.dtype)


def _hadamard(size: int) -> Tensor:
    try:
        return torch.from_numpy(hadamard(size))
    except ValueError as error:
        raise WeightsError(f"--rotate: {error}") from None


def _head_turn(config: Config) -> tuple[Tensor, int] | None:
    """The matrix that turns values, and how many KV heads there are; None with latent attention."""
    model = config.model
    if model.attention == "mla":
        return None
    heads = model.num_attention_heads
    size = model.kv_channels or model.hidden_size // heads
    return _hadamard(size), model.num_query_groups or heads


def _rotated(
    name: str, weight: Tensor, source: Source, turn: Tensor, head: tuple[Tensor, int] | None
) -> Tensor:
    if name.startswith("embedding."):
        return weight @ turn
    if name == "output_layer.weight":
        return weight * source.read("decoder.final_layernorm.weight").double() @ turn
    found = _LAYER.fullmatch(name)
    prefix, part = found.groups() if found else ("", name)
    if part in (*_READERS.values(), "decoder.final_layernorm.weight"):
        return torch.ones_like(weight)
    if part == "layer_patch.weight":
        return turn.T @ weight @ turn
    if head and part.startswith("self_attention.linear_qkv."):
        weight = _turn_values(weight, *head)
    if head and part == "self_attention.linear_proj.weight":
        weight = (weight.unflatten(1, (-1, len(head[0]))) @ head[0]).flatten(1)
    if part in _READERS:
        gain = source.read(prefix + _READERS[part]).double()
        return (weight.movedim(1, -1) * gain @ turn).movedim(-1, 1)
    if part in _WRITERS:
        return (weight.movedim(_WRITERS[part], -1) @ turn).movedim(-1, _WRITERS[part])
    if not part.endswith(_UNTOUCHED):
        raise WeightsError(f"--rotate: {name} is not known to it")
    return weight


def _turn_values(weight: Tensor, turn: Tensor, groups: int) -> Tensor:
    """`linear_qkv`, in which each KV head's queries, key and value follow each other, with the
    rows of its values turned."""
    size = len(turn)
    parts = weight.clone().unflatten(0, (groups, -1))
    parts[:, -size:] = torch.einsum("vw,gv...->gw...", turn, parts[:, -size:])
    return parts.flatten(0, 1)
