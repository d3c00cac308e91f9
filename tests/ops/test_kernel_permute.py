import in_interpreter  # first
import pytest
import torch

from pangu.ops.kernels.permute import sort_choices
from pangu.ops.permute import (
    Permutation,
    permute_reference,
    permute_triton,
    plan,
    plan_map,
    unpermute_reference,
    unpermute_triton,
)

EXPERTS = 11


def routed(kind: str, tokens: int, choices: int = 3) -> torch.Tensor:
    """Distinct experts of each token, `[T, K]`, ascending."""
    generator = torch.Generator().manual_seed(tokens)
    if kind == "one-hot":  # all tokens to the same, all others empty
        return torch.arange(choices).expand(tokens, choices)
    popularity = torch.arange(1.0, EXPERTS + 1) ** (-1.2 if kind == "Zipf" else 0.0)
    drawn = torch.multinomial(popularity.expand(tokens, -1), choices, generator=generator)
    return drawn.sort(dim=1).values


@pytest.mark.parametrize("kind", ["even", "one-hot", "Zipf"])
@pytest.mark.parametrize("tokens", [1, 43, 129])
def test_choices_are_sorted_as_by_a_stable_sort(kind, tokens):
    experts = routed(kind, tokens)
    expected = plan(experts, EXPERTS)
    order, token, slots, counts = sort_choices(experts, EXPERTS)
    assert torch.equal(order, expected.order_N)
    assert torch.equal(token, expected.tokens_N)
    assert torch.equal(slots, expected.slots_N)
    assert torch.equal(counts, expected.counts_E)
    assert {each.dtype for each in (order, token, slots, counts)} == {torch.int64}


@in_interpreter.DTYPES
@pytest.mark.parametrize("kind", ["one-hot", "Zipf", "ragged"])
@pytest.mark.parametrize(("tokens", "width"), [(43, 24), (3, 1040)])
def test_rows_go_and_come_back_as_by_indexing(kind, tokens, width, dtype):
    if kind == "ragged":  # some tokens have no choice, none has three
        chosen = torch.rand(tokens, EXPERTS) < 0.2
        chosen[0] = False
        permutation = plan_map(chosen)
    else:
        permutation = plan(routed(kind, tokens), EXPERTS)
    rows = permutation.tokens_N.numel()
    for function, reference, x in (
        (permute_triton, permute_reference, torch.randn(tokens, width)),
        (unpermute_triton, unpermute_reference, torch.randn(rows, width)),
    ):
        in_interpreter.follows(
            lambda x, move=function, by=permutation: move(x, by),
            lambda x, move=reference, by=permutation: move(x, by),
            (x.to(dtype),),
            dtype=dtype,
        )


def test_no_tokens_are_nothing():
    order, token, slots, counts = sort_choices(torch.empty(0, 2, dtype=torch.int64), 3)
    assert (order.numel(), counts.tolist()) == (0, [0, 0, 0])
    starts = torch.empty(0, dtype=torch.int64)
    permutation = Permutation(order, token, slots, starts, counts, 2)
    x = torch.empty(0, 4, requires_grad=True)
    unpermute_triton(permute_triton(x, permutation), permutation).sum().backward()
    assert x.grad.shape == (0, 4)
