"""The MoGE layer against ten lines that follow the paper (arXiv 2505.21411, §2)."""

import pytest
import torch
from against import build, relative_error
from gloo import single


def moge(x, router, w1, w2, groups, choices, divided):
    """Softmax over all experts; the best `choices` of every group; their probabilities, perhaps
    `divided` by their sum (which the paper does not do)."""
    probs = (x @ router.T).softmax(-1)
    out = torch.zeros_like(x)
    size = len(router) // groups
    for t, token in enumerate(x):
        best = probs[t].view(groups, size).sort(descending=True, stable=True).values
        total = best[:, :choices].sum() if divided else 1
        for group in range(groups):
            order = probs[t, group * size : (group + 1) * size].argsort(
                descending=True, stable=True
            )
            for e in (order[:choices] + group * size).tolist():
                gate, up = w1[e].unbind(1)
                hidden = torch.nn.functional.silu(token @ gate) * (token @ up)
                out[t] = out[t] + probs[t, e] / total * (hidden @ w2[e])
    return out


@pytest.mark.parametrize(
    ("router_scale", "renormalize"), [(False, False), (True, False), (False, True)]
)
def test_output_and_gradients(router_scale, renormalize):
    single()
    model = build(
        [
            "model.num_experts=8",
            "model.moe_ffn_hidden_size=16",
            "model.shared_expert_ffn_hidden_size=0",
            "model.num_query_groups=4",
            "model.kv_channels=8",
            "moe=moge",
            "moe.top_k=4",
            "moe.num_expert_groups=2",
            f"moe.router_scale={str(router_scale).lower()}",
            f"moe.renormalize={str(renormalize).lower()}",
        ]
    )
    layer = model.decoder.layers[0].mlp
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(5, 2, 32, generator=generator)
    results = []
    for function in (
        lambda x: layer(x)[0],
        lambda x: reference(layer, x, divided=renormalize),
    ):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        out = function(inputs)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        gradients = [parameter.grad for parameter in layer.parameters()]
        results.append([out.detach(), inputs.grad, *gradients])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-5


def reference(layer, x, *, divided):
    router, experts = layer.router, layer.experts
    scale = getattr(router, "router_scale", None)
    w2 = experts.w2 if scale is None else experts.w2 * scale[:, None, None]
    out = moge(x.flatten(0, 1), router.weight, experts.w1, w2, groups=2, choices=2, divided=divided)
    return out.view_as(x)
