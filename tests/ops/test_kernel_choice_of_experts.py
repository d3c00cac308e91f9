import in_interpreter  # first
import pytest
import torch

from pangu.ops import choice


@in_interpreter.DTYPES
@pytest.mark.parametrize(
    ("shape", "k"), [((1, 8), 8), ((43, 8), 3), ((37, 4, 6), 1), ((5, 130), 12)]
)
def test_the_highest_are_those_of_a_stable_sort(shape, k, dtype):
    few = torch.randint(0, 4, shape).to(dtype)  # equals everywhere
    for scores in (few, torch.randn(shape).to(dtype)):
        assert torch.equal(choice.highest_triton(scores, k), choice.highest_reference(scores, k))


def test_what_is_no_number_is_lowest_and_as_many_are_chosen():
    nan, low = float("nan"), float("-inf")
    scores = torch.tensor([[nan, low, 1.0, nan], [nan, nan, nan, nan], [low, low, low, 0.0]])
    chosen = choice.highest_triton(scores, 2)
    assert torch.equal(chosen, choice.highest_reference(scores, 2))
    assert chosen.sum(1).tolist() == [2, 2, 2]


@in_interpreter.DTYPES
@pytest.mark.parametrize("shape", [(43, 8), (3, 5, 24)])
def test_choices_are_listed_in_order_with_their_gradients(shape, dtype):
    chosen = choice.highest_reference(torch.randn(shape), 3)
    weights = torch.randn(shape).to(dtype)
    assert torch.equal(
        choice.choices_triton(weights, chosen, 3)[0], choice.choices_torch(weights, chosen, 3)[0]
    )
    in_interpreter.follows(
        lambda x: choice.choices_triton(x, chosen, 3)[1],
        lambda x: x.masked_select(chosen).view(*shape[:-1], 3),
        (weights,),
        dtype=dtype,
    )


def test_what_no_kernel_takes_is_left_to_torch():
    for scores in (torch.randn(2, 9, dtype=torch.float64), torch.randn(2, 1030)):
        assert torch.equal(choice.highest_triton(scores, 4), choice.highest_reference(scores, 4))
    assert choice.highest_triton(torch.empty(0, 8), 2).shape == (0, 8)
