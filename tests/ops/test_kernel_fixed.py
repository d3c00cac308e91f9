"""Products and attention whose rows do not depend on how many there are."""

import in_interpreter  # noqa: F401  (first)
import numpy as np
import pytest
import torch

from pangu.ops.attention import attention_reference
from pangu.ops.grouped_matmul import Loop
from pangu.ops.kernels import fixed_attention, fixed_matmul

# Triton's interpreter multiplies the bits of bfloat16 as integers in `tl.dot`.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2**-10}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=("float32", "float16"))


@pytest.fixture(autouse=True)
def rows_alike(monkeypatch):
    """Matrix units treat a tile's rows alike, wherever in it they are; the library with which the
    interpreter multiplies does not."""

    def matmul(a, b, dtype):
        return (a.astype(dtype)[:, :, None] * b.astype(dtype)[None]).sum(axis=1)

    monkeypatch.setattr(np, "matmul", matmul)


def close(found, expected, dtype):
    difference = (found.double() - expected).abs().max() / expected.abs().max()
    assert difference <= TOLERANCES[dtype]


@DTYPES
@pytest.mark.parametrize("shape", [(1, 40, 70), (37, 130, 64), (16, 32, 3)])
def test_a_product_follows_float64_and_its_rows_stand_alone(shape, dtype):
    rows, inputs, outputs = shape
    x, w = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype).t()
    found = fixed_matmul.product(x, w)
    assert found.dtype == dtype
    close(found, x.double() @ w.double(), dtype)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(fixed_matmul.product(x[row : row + 1], w)[0], found[row])
    if rows > 2:
        assert torch.equal(fixed_matmul.product(x[2:], w), found[2:])


@DTYPES
def test_experts_follow_float64_and_their_rows_stand_alone(dtype):
    counts = torch.tensor([3, 0, 20, 1, 16, 0])
    x, w = torch.randn(40, 24).to(dtype), torch.randn(6, 24, 70).to(dtype)
    found = fixed_matmul.grouped(x, w, counts)
    close(found, Loop.rows(x.double(), w.double(), counts), dtype)
    for row, expert in ((2, 0), (3, 2), (22, 2), (23, 3), (39, 4)):
        one = torch.zeros(6, dtype=torch.int64)
        one[expert] = 1
        assert torch.equal(fixed_matmul.grouped(x[row : row + 1], w, one)[0], found[row])
    assert fixed_matmul.grouped(x[:0], w, 0 * counts).shape == (0, 70)
    both = fixed_matmul.batched(x.view(2, 20, 24), w[:2])
    close(both, x.view(2, 20, 24).double() @ w[:2].double(), dtype)


def test_float64_is_summed_in_float64():
    x, w = torch.randn(5, 40, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    torch.testing.assert_close(fixed_matmul.product(x, w), x @ w, rtol=1e-13, atol=1e-13)


@DTYPES
@pytest.mark.parametrize(("heads", "groups", "sizes"), [(4, 2, (8, 8)), (3, 1, (24, 16))])
def test_attention_follows_float64_and_its_queries_stand_alone(heads, groups, sizes, dtype):
    """A chunk of queries behind others; each of them, alone with the keys up to its own; and such
    as have only some keys, as a branch of guesses."""
    width, value_width = sizes
    query = torch.randn(5, heads, width).to(dtype)
    key, value = torch.randn(70, groups, width), torch.randn(70, groups, value_width)
    key, value = key.to(dtype), value.to(dtype)
    found = fixed_attention.attention(query, key, value, 0.3, None)

    def expected(query, key, value, seen):
        wide = [each.double()[:, None] for each in (query, key, value)]
        return attention_reference(*wide, scale=0.3, seen=seen)[:, 0]

    close(found, expected(query, key, value, None), dtype)
    for row in range(5):
        end = 70 - 4 + row
        one = fixed_attention.attention(query[row : row + 1], key[:end], value[:end], 0.3, None)
        assert torch.equal(one[0], found[row])
    seen = torch.rand(5, 70) < 0.5
    seen[:, 0] = True
    branch = fixed_attention.attention(query, key, value, 0.3, seen)
    close(branch, expected(query, key, value, seen), dtype)


def test_keys_are_read_where_they_lie():
    store = torch.randn(2, 90, 8)  # [g, slots, d]
    key = store.transpose(0, 1)[10:43]
    query = torch.randn(1, 4, 8)
    found = fixed_attention.attention(query, key, key, 0.5, None)
    again = fixed_attention.attention(query, key.contiguous(), key.contiguous(), 0.5, None)
    assert torch.equal(found, again)
