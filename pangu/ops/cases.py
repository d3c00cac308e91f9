"""Every operator as the backend runs it beside its reference: small inputs, both passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from pangu import backends
from pangu.ops import (
    adamw,
    attention,
    choice,
    cross_entropy,
    grouped_matmul,
    linear_cross_entropy,
    permute,
    rms_norm,
    rotary,
    routing,
    swiglu,
    weight_gradient,
)

Tensor = torch.Tensor
# Largest difference from the reference in float64, relative to its largest value. Matrix units may
# round float32 to fewer bits.
TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 2e-2}
# Cases called otherwise than their operator.
OPERATORS = {
    "unpermute": "permute",
    "attention, documents": "attention",
    "attention, a mask": "attention",
}


class Case(NamedTuple):
    """An operator, its reference, and inputs in float64; integers are passed as they are."""

    name: str
    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]

    @property
    def operator(self) -> str:
        """By its name in `backends.Operators`."""
        return OPERATORS.get(self.name, self.name)


class Outcome(NamedTuple):
    """`error`: of the output and of every gradient, the largest, relative; or what was raised."""

    name: str
    operator: str
    dtype: torch.dtype
    error: float
    raised: str

    @property
    def holds(self) -> bool:
        return not self.raised and self.error <= TOLERANCES[self.dtype]

    @property
    def reason(self) -> str:
        """Why it does not hold."""
        return self.raised or f"off by {self.error:.1e}"


def cases() -> Iterator[Case]:
    """Every operator: groups of uneven sizes, one of them empty; GQA; documents of odd
    lengths."""
    normal = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=normal, dtype=torch.float64)

    tokens, hidden, width, experts = 96, 64, 128, 4
    counts = torch.tensor([40, 0, 23, 33])
    rows, weights = randn(tokens, hidden), randn(experts, hidden, width) / hidden**0.5
    yield Case(
        "grouped_matmul",
        lambda x, w: grouped_matmul.grouped_matmul(x, w, counts.to(x.device)),
        lambda x, w: grouped_matmul.grouped_matmul(x, w, counts, grouped_matmul.Loop),
        (rows, weights),
    )
    yield _added_up(rows, randn(tokens, width), counts, randn(experts, hidden, width))
    chosen = randn(tokens, experts).topk(2).indices
    plan = permute.plan(chosen, experts)
    yield Case(
        "permute",
        lambda x: permute.permute(x, permute.plan(chosen.to(x.device), experts)),
        lambda x: permute.permute_reference(x, plan),
        (rows,),
    )
    yield Case(
        "unpermute",
        lambda x: permute.unpermute(x, permute.plan(chosen.to(x.device), experts)),
        lambda x: permute.unpermute_reference(x, plan),
        (randn(2 * tokens, hidden),),
    )
    gates = (randn(tokens, 2 * width), randn(tokens).abs())
    yield Case("swiglu", swiglu.swiglu, swiglu.swiglu_reference, gates)
    norm = (rows, randn(hidden).abs())
    yield Case(
        "rms_norm",
        lambda x, w: rms_norm.rms_norm(x, w, 1e-5),
        lambda x, w: rms_norm.rms_norm_reference(x, w, 1e-5),
        norm,
    )
    yield Case(
        "choice",
        lambda x: choice.choices(x, choice.highest(x.detach(), 3), 3)[1],
        lambda x: x.masked_select(choice.highest_reference(x.detach(), 3)).view(-1, 3),
        (randn(tokens, experts),),
    )
    yield from _lost(randn)
    yield Case(
        "adamw",
        lambda *given: _updated(adamw.adamw, *given),
        lambda *given: _updated(adamw.adamw_reference, *given),
        (randn(7, 40), randn(7, 40), randn(7, 40), randn(7, 40).square() + 0.1),
    )
    yield from _routed_turned_and_attended(randn)


def _updated(form: Callable[..., None], *given: Tensor) -> Tensor:
    """Main copy and moments after a step, which have no gradient, beside the inputs, which do. Main
    copy and gradient are in float32 or wider, moments as they come."""
    main, gradient, exp_avg, exp_avg_sq = (each.detach().clone() for each in given)
    wide = torch.promote_types(main.dtype, torch.float32)
    state = adamw.State(main.to(wide), gradient.to(wide), exp_avg, exp_avg_sq, None)
    told = (torch.full((1,), value, device=main.device) for value in (3.0, 0.5, 0.0))
    form([state], adamw.Rule(1e-2, 0.9, 0.95, 1e-8, 0.1), adamw.Verdict(*told))
    return torch.stack((state.main, exp_avg.to(wide), exp_avg_sq.to(wide))) + sum(given)


def _lost(randn: Callable[..., Tensor]) -> Iterator[Case]:
    tokens, hidden, width = 96, 64, 128
    labels = torch.arange(tokens)
    yield Case(
        "cross_entropy",  # uses its input up
        lambda x: cross_entropy.cross_entropy(x.clone(), labels.to(x.device)),
        lambda x: cross_entropy.cross_entropy_reference(x, labels),
        (randn(tokens, width),),
    )
    many = 300  # more than one chunk
    counted = 1.0 + torch.arange(many) / many  # as `compared` weighs the results
    wanted = torch.arange(many) % width
    yield Case(
        "linear_cross_entropy",
        lambda x, w: linear_cross_entropy.linear_cross_entropy(
            x, w, wanted.to(x.device), counted.to(x.device)
        ),
        lambda x, w: linear_cross_entropy.linear_cross_entropy_reference(x, w, wanted, counted),
        (randn(many, hidden), randn(width, hidden) / hidden**0.5),
    )


def _added_up(rows: Tensor, upstream: Tensor, counts: Tensor, before: Tensor) -> Case:
    """A weight's gradient where the engine gathers it in float32, beside what is there already."""

    def gathered(x: Tensor, y: Tensor) -> Tensor:
        weight: Any = torch.zeros(before.shape, dtype=x.dtype, device=x.device, requires_grad=True)
        weight.main_grad = before.float().to(x.device)
        weight.grad_added_to_main_grad = False
        found = grouped_matmul.grouped_matmul(
            x.detach(), weight, counts.to(x.device), parameter=weight
        )
        found.backward(y.detach())
        if not weight.grad_added_to_main_grad:
            weight.main_grad += weight.grad
        return weight.main_grad

    return Case(
        "weight_gradient",
        gathered,
        lambda x, y: weight_gradient.weight_gradient_reference(
            before.float().double(), x.detach(), y.detach(), counts
        ),
        (rows, upstream),
    )


def _routed_turned_and_attended(randn: Callable[..., Tensor]) -> Iterator[Case]:
    tokens = 96
    rule = routing.Rule(2, 2, softmax=True, renormalize=False, factor=1.0)
    route = routing.route_triton if routing.in_one_pass() else routing.route_reference
    yield Case(
        "routing",
        lambda x: route(x.float(), None, rule)[0],
        lambda x: routing.route_reference(x, None, rule)[0],
        (randn(tokens, 8),),
    )
    angles = randn(tokens, 1, 1, 16)
    yield Case(
        "rotary",
        lambda x: rotary.rotary(x, angles.float().to(x.device)),
        lambda x: rotary.rotary_reference(x, angles.float()),
        (randn(tokens, 2, 4, 24),),
    )
    heads = randn(tokens, 2, 4, 16)
    lengths = torch.tensor([[37, 1, 58], [51, 45, 0]])
    documents = torch.stack([torch.arange(3).repeat_interleave(each) for each in lengths])
    keys = (randn(tokens, 2, 2, 16), randn(tokens, 2, 2, 16))
    tree = torch.ones(tokens, tokens, dtype=torch.bool).tril() & (torch.arange(tokens) % 7 != 3)
    for name, hides in (
        ("attention", {}),
        ("attention, documents", {"document_ids": documents}),
        ("attention, a mask", {"seen": tree}),
    ):
        yield Case(
            name,
            lambda q, k, v, hides=hides: attention.attention(
                q, k, v, scale=0.25, **{name: each.to(q.device) for name, each in hides.items()}
            ),
            lambda q, k, v, hides=hides: attention.attention_reference(
                q, k, v, scale=0.25, **hides
            ),
            (heads, *keys),
        )


def compared(case: Case, dtype: torch.dtype) -> Outcome:
    """The backend's operator in `dtype` against the reference in float64 on the host, which is
    given the same rounded inputs."""
    device = backends.current().device
    given = [each.to(dtype).to(device) for each in case.inputs]
    wide = [each.cpu().double().requires_grad_() for each in given]
    expected = case.reference(*wide)
    upstream = torch.ones_like(expected) + torch.arange(expected.size(0)).view(
        -1, *[1] * (expected.dim() - 1)
    ) / expected.size(0)
    differentiable = expected.requires_grad
    gradients = torch.autograd.grad(expected, wide, upstream) if differentiable else ()
    inputs = [each.requires_grad_() for each in given]
    try:
        found = case.run(*inputs)
        theirs: tuple[Tensor, ...] = ()
        if differentiable:
            theirs = torch.autograd.grad(found, inputs, upstream.to(found.dtype).to(device))
        backends.current().synchronize()
    except Exception as error:  # a device's, a compiler's: whatever it is, it is the answer
        return Outcome(case.name, case.operator, dtype, float("nan"), _first_line(error))
    pairs = zip((found, *theirs), (expected, *gradients), strict=True)
    return Outcome(case.name, case.operator, dtype, max(_difference(*pair) for pair in pairs), "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _difference(found: Tensor, expected: Tensor) -> float:
    off = (found.detach().cpu().double() - expected.detach()).abs().max()
    return float(torch.nan_to_num(off / expected.detach().abs().max(), nan=float("inf")))
