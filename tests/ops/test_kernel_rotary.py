import in_interpreter  # first
import pytest
import torch

from pangu.ops.rotary import rotary_reference, rotary_triton


@in_interpreter.DTYPES
@pytest.mark.parametrize("pairs", [False, True], ids=("halves", "pairs"))
@pytest.mark.parametrize(("shape", "turned"), [((7, 2, 3, 16), 16), ((5, 1, 2, 24), 10)])
def test_turned_heads_and_gradients_follow_the_reference(shape, turned, pairs, dtype):
    angles = 100 * torch.rand(shape[0], 1, 1, turned)
    in_interpreter.follows(
        lambda x: rotary_triton(x, angles, pairs=pairs, scale=0.7),
        lambda x: rotary_reference(x, angles, pairs=pairs, scale=0.7),
        (torch.randn(shape).to(dtype),),
        dtype=dtype,
    )


def test_heads_are_read_where_they_lie():
    """As queries come: a slice of what one product gave, and with other strides still."""
    mixed = torch.randn(5, 2, 3, 40)
    angles = torch.rand(5, 1, 1, 16)
    for x in (mixed[..., 8:24], mixed[..., ::2][..., :16], mixed.transpose(1, 2)[..., :16]):
        torch.testing.assert_close(rotary_triton(x, angles), rotary_reference(x, angles))


def test_float64_and_no_positions():
    x, angles = torch.randn(2, 1, 1, 4, dtype=torch.float64), torch.rand(2, 1, 1, 4)
    assert torch.equal(rotary_triton(x, angles), rotary_reference(x, angles))
    assert rotary_triton(torch.empty(0, 1, 2, 4), angles[:0]).shape == (0, 1, 2, 4)
