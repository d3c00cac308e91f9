"""A small MoE layer with known weights in any layout, and the same layer in a few lines."""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from megatron.core.transformer.spec_utils import build_module

from configs.schema import (
    BackendConfig,
    Config,
    LaunchConfig,
    MemoryConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
)
from pangu.model.transformer_config import transformer_config
from pangu.moe.layer import moe_layer_spec
from pangu.moe.routing import routing_for

HIDDEN, WIDTH, SHARED, EXPERTS = 8, 6, 4, 8
MODEL = ModelConfig(
    name="layer",
    num_layers=1,
    hidden_size=HIDDEN,
    num_attention_heads=4,
    vocab_size=16,
    num_experts=EXPERTS,
    moe_ffn_hidden_size=WIDTH,
    shared_expert_ffn_hidden_size=SHARED,
)
MOGE = MoEConfig(router="moge", num_expert_groups=4, top_k=4, aux_loss_coefficient=0.0)
TOP_K = MoEConfig(router="top_k", top_k=3, renormalize=True, aux_loss_coefficient=0.0)


def full_weights(model=MODEL, dtype=torch.float64):
    """By parameter name, unsplit."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    experts, width = model.num_experts, model.moe_ffn_hidden_size
    hidden, shared = model.hidden_size, model.shared_expert_ffn_hidden_size
    weights = {
        "router.weight": draw(experts, hidden),
        "router.router_scale": 1 + 0.1 * draw(experts),
        "experts.w1": draw(experts, hidden, 2, width),
        "experts.w2": draw(experts, width, hidden),
    }
    if shared:
        weights["shared_experts.linear_fc1.weight"] = draw(2 * shared, hidden)
        weights["shared_experts.linear_fc2.weight"] = draw(hidden, shared)
    return weights


def own_part(name, full):
    """This rank's slice of a full weight, as its documentation says."""
    if name.startswith("experts"):
        ep = parallel_state.get_expert_model_parallel_group()
        etp = parallel_state.get_expert_tensor_parallel_group()
        mine = full.chunk(ep.size(), 0)[ep.rank()]
        return mine.chunk(etp.size(), 3 if name.endswith("w1") else 1)[etp.rank()]
    if name.startswith("shared"):
        tp = parallel_state.get_tensor_model_parallel_group()
        if name.endswith("linear_fc2.weight"):
            return full.chunk(tp.size(), 1)[tp.rank()]
        return torch.cat([half.chunk(tp.size(), 0)[tp.rank()] for half in full.chunk(2, 0)])
    return full


def build(
    moe,
    parallel=None,
    model=MODEL,
    memory=None,
    precision="fp64",
    **options,
):
    """The layer of this rank, in training mode."""
    config = Config(
        model=model,
        moe=moe,
        parallel=parallel or ParallelConfig(),
        memory=memory or MemoryConfig(),
        launch=LaunchConfig(processes=dist.get_world_size()),
        backend=BackendConfig(name="cpu", precision=precision),
    )
    settings = replace(transformer_config(config), **options) if options else None
    settings = settings or transformer_config(config)
    layer = build_module(moe_layer_spec(settings), config=settings)
    layer.set_layer_number(1)
    weights = full_weights(model, settings.params_dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(own_part(name, weights[name]))
    return layer.train()


def reference(tokens, weights, moe):
    """Tokens `[T, H]` through every expert, one at a time."""
    probs, chosen = routing_for(moe)(tokens @ weights["router.weight"].t())
    if moe.router_scale:
        probs = probs * weights["router.router_scale"]
    if moe.capacity_factor:
        probs, chosen = apply_router_token_dropping(probs, chosen, moe.top_k, moe.capacity_factor)
    output = torch.zeros_like(tokens)
    for e in range(weights["experts.w1"].size(0)):
        gate, up = (tokens @ weights["experts.w1"][e, :, i] for i in (0, 1))
        mlp = (F.silu(gate) * up) @ weights["experts.w2"][e]
        output = output + torch.where(chosen[:, e, None], probs[:, e, None] * mlp, 0)
    if "shared_experts.linear_fc1.weight" in weights:
        gate, up = (tokens @ weights["shared_experts.linear_fc1.weight"].t()).chunk(2, -1)
        output = output + (F.silu(gate) * up) @ weights["shared_experts.linear_fc2.weight"].t()
    return output


def summed(name, gradient, sequence_parallel):
    """A gradient of this rank, summed over the ranks that hold the same weight and see other
    tokens: what megatron-core's gradient reduction does."""
    gradient = gradient.clone()
    if name.startswith("experts"):
        dist.all_reduce(gradient, group=parallel_state.get_expert_data_parallel_group())
        return gradient
    dist.all_reduce(gradient, group=parallel_state.get_data_parallel_group(True))
    if name.startswith("router") and sequence_parallel:
        dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    return gradient
