"""The gradient of the router's losses is the same however the same micro-batches are split."""

from dataclasses import replace

import gloo
import layers
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from configs.schema import MoEConfig, ParallelConfig
from pangu.moe.load import read_load
from pangu.moe.routing import routing_for

POSITIONS, SEQUENCES, MICRO_BATCHES = 8, 2, 4
MOGE = MoEConfig(
    router="moge", num_expert_groups=4, top_k=4, aux_loss_coefficient=0.5, z_loss_coefficient=0.1
)
SIGMOID = MoEConfig(
    router="group_limited",
    num_expert_groups=4,
    topk_group=2,
    top_k=2,
    score_function="sigmoid",
    renormalize=True,
    expert_bias=True,
    aux_loss_coefficient=0.5,
)
AFTER = MoEConfig(top_k=2, softmax_after_top_k=True, aux_loss_coefficient=0.5)
# (tensor, context, expert) parallel sizes on four ranks; the rest is data parallel, and so many
# accumulation steps that there are always four micro-batches.
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 1, 1), (2, 2, 4)]


def micro_batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(11)
    shape = (MICRO_BATCHES, POSITIONS, SEQUENCES, layers.HIDDEN)
    return torch.randn(shape, generator=generator, dtype=dtype)


def window(scope, n, data):
    """The micro-batches whose choices the loss of number n counts; EP groups span two."""
    if scope == "global_batch":
        return range(n + 1)
    if scope in ("ep_group", "dp_group"):
        size = data if scope == "dp_group" else 2
        return range(n // size * size, (n // size + 1) * size)
    return [n]


def reference(moe, scope, data=1):
    """Mean over the micro-batches of both losses, and its gradients, by the formulas."""
    inputs = micro_batches().requires_grad_()
    weight = layers.full_weights()["router.weight"].requires_grad_()
    routing = routing_for(moe)
    logits = inputs @ weight.t()
    if moe.score_function == "sigmoid":
        scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    else:
        scores = logits.softmax(-1)
    chosen = torch.stack([routing(x.flatten(0, 1))[1].view_as(x) for x in logits])
    auxiliary = []
    for n in range(MICRO_BATCHES):
        # Each part is a set of tokens of its own: the micro-batch, or one of its sequences.
        parts = (
            [slice(b, b + 1) for b in range(SEQUENCES)] if scope == "sequence" else [slice(None)]
        )
        for part in parts:
            counted = torch.stack([chosen[i][:, part] for i in window(scope, n, data)])
            counts = counted.flatten(0, 2).sum(0).double()
            frequency = layers.EXPERTS * counts / counts.sum()
            probability = scores[n][:, part].flatten(0, 1).mean(0)
            auxiliary.append(moe.aux_loss_coefficient * (frequency * probability).sum())
    auxiliary = torch.stack(auxiliary).mean()
    z = logits.logsumexp(-1).square().mean()
    (auxiliary + moe.z_loss_coefficient * z).backward()
    return {
        "aux": auxiliary.detach() / moe.aux_loss_coefficient,
        "z": z.detach() if moe.z_loss_coefficient else torch.zeros(()),
        "counts": chosen.flatten(0, 2).sum(0),
        "weight": weight.grad,
        "input": inputs.grad,
    }


def measure(moe, parallel, per_token):
    """The same through the router in this layout, reduced as megatron-core reduces."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    data = parallel_state.get_data_parallel_world_size()
    steps = MICRO_BATCHES // data
    layer = layers.build(moe, parallel, calculate_per_token_loss=per_token)
    router = layer.router
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1.0 if per_token else context / steps]))

    def part(x):  # of a micro-batch [S, B, H]
        x = x.chunk(context, 0)[parallel_state.get_context_parallel_rank()]
        return x.chunk(tensor, 0)[parallel_state.get_tensor_model_parallel_rank()]

    unit = MICRO_BATCHES * POSITIONS * SEQUENCES if per_token else data * context
    expected_inputs = reference(replace(moe, expert_bias=False), moe.aux_loss_scope, data)["input"]
    worst = 0.0
    for step in range(steps):
        n = step * data + parallel_state.get_data_parallel_rank()
        own = part(micro_batches()[n]).clone().requires_grad_()
        weights, _ = router(own)
        (weights * 0).sum().backward()
        worst = max(worst, (own.grad / unit - part(expected_inputs[n])).abs().max().item())
    router.reset_global_aux_loss_tracker()
    gradient = layers.summed("router.weight", router.weight.grad, tensor > 1) / unit
    load = read_load([Model(layer)])
    return {
        "input error": worst,
        "weight": gradient,
        "aux": load.aux_loss,
        "z": load.z_loss,
        "counts": load.counts[1],
    }


class Model(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.config = layer.config


def compare(cases):
    found = []
    current = None
    for moe, layout, per_token in cases:
        names = ("tensor_model_parallel", "context_parallel", "expert_model_parallel")
        sizes = {f"{name}_size": size for name, size in zip(names, layout, strict=True)}
        sizes["expert_tensor_parallel_size"] = 1
        if layout != current:  # groups are slow to make
            gloo.parallel(**sizes)
            current = layout
        found.append(measure(moe, ParallelConfig(**sizes), per_token))
    return found


SCOPES = ["micro_batch", "sequence", "global_batch"]
CASES = [
    *(
        (replace(MOGE, aux_loss_scope=scope), layout, True)
        for scope in SCOPES
        for layout in LAYOUTS
    ),
    *((MOGE, layout, False) for layout in LAYOUTS),
    *((moe, layout, True) for moe in (SIGMOID, AFTER) for layout in LAYOUTS[:4]),
    # Named after groups: the same for every split that keeps the group's size.
    (replace(MOGE, aux_loss_scope="ep_group"), (1, 1, 2), True),
    (replace(MOGE, aux_loss_scope="ep_group"), (2, 1, 4), True),
    (replace(MOGE, aux_loss_scope="dp_group"), (2, 1, 1), True),
    (replace(MOGE, aux_loss_scope="dp_group"), (1, 2, 2), True),
]
CASES.sort(key=lambda case: case[1])


@pytest.mark.distributed
def test_losses_and_gradients_do_not_depend_on_the_split():
    results = gloo.run(4, compare, CASES)
    for index, (moe, (tensor, context, expert), per_token) in enumerate(CASES):
        data = 4 // (tensor * context)
        expected = reference(replace(moe, expert_bias=False), moe.aux_loss_scope, data)
        case = f"{moe.router} {moe.aux_loss_scope} {tensor, context, expert} {per_token}"
        for rank in results:
            found = rank[index]
            assert found["input error"] < 1e-14, case
            torch.testing.assert_close(
                found["weight"], expected["weight"], rtol=1e-12, atol=1e-14, msg=case
            )
            # The record is float32.
            assert found["aux"] == pytest.approx(expected["aux"].item(), rel=1e-5), case
            assert found["z"] == pytest.approx(expected["z"].item(), rel=1e-5), case
            assert torch.equal(found["counts"], expected["counts"]), case
