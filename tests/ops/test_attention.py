"""Fused attention against the reference that forms every score."""

import pytest
import torch

from pangu.ops.attention import (
    attention,
    attention_of_few,
    attention_of_one,
    attention_reference,
    document_ends,
    visible,
)


def tensors(s, t, heads, groups, size, value_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(s, 2, heads, size), (t, 2, groups, size), (t, 2, groups, value_size)]
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in shapes
    ]


@pytest.mark.parametrize("heads_groups", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("value_size", [8, 6])
@pytest.mark.parametrize("documents", [False, True])
def test_outputs_and_gradients_equal_the_reference(heads_groups, value_size, documents):
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 3, 3]]) if documents else None
    results = []
    for function in (attention, attention_reference):
        inputs = tensors(7, 7, *heads_groups, 8, value_size)
        out = function(*inputs, scale=0.3, document_ids=ids)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("s", [1, 3])
def test_queries_behind_a_cache_see_all_earlier_keys(s):
    query, key, value = tensors(7, 7, 4, 2, 8, 8)
    whole = attention_reference(query, key, value, scale=0.3)
    last = attention(query[-s:], key, value, scale=0.3)
    torch.testing.assert_close(last, whole[-s:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("heads_groups", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("value_size", [8, 6])
def test_a_single_query_is_the_last_of_all(heads_groups, value_size):
    query, key, value = (x.detach()[:, :1] for x in tensors(7, 7, *heads_groups, 8, value_size))
    whole = attention_reference(query, key, value, scale=0.3)
    heads_first = (key[:, 0].transpose(0, 1), value[:, 0].transpose(0, 1))
    last = attention_of_one(query[-1:, :1], *heads_first, scale=0.3)
    torch.testing.assert_close(last, whole[-1:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("heads_groups", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("value_size", [8, 6])
@pytest.mark.parametrize("s", [1, 3])
def test_a_few_queries_of_two_sequences_see_what_the_bias_lets_them(heads_groups, value_size, s):
    query, key, value = (x.detach() for x in tensors(s, 7, *heads_groups, 8, value_size))
    seen = torch.rand(2, 1, s, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    seen[..., 0] = True
    bias = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, float("-inf"))
    heads_first = (x.permute(1, 2, 0, 3) for x in (key, value))
    found = attention_of_few(query.transpose(0, 1), *heads_first, bias, scale=0.3)
    for number in range(2):
        own = (x[:, number : number + 1] for x in (query, key, value))
        plain = attention_reference(*own, scale=0.3, seen=seen[number, 0])
        torch.testing.assert_close(found[number], plain[:, 0], rtol=1e-12, atol=1e-13)


def test_visible_is_causal_and_stays_inside_documents():
    mask = visible(3, 3, torch.tensor([[0, 1, 1]]), torch.device("cpu"))
    expected = [[True, False, False], [False, True, False], [False, True, True]]
    assert mask[0, 0].tolist() == expected


def test_documents_end_where_their_number_changes_and_where_a_sequence_does():
    assert document_ends(torch.tensor([[0, 1, 1, 5, 5], [5, 5, 6, 6, 7]])) == [1, 3, 5, 7, 9, 10]
    assert document_ends(torch.zeros(3, 4, dtype=torch.int32)) == [4, 8, 12]
