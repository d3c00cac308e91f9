"""The norm of all gradients, against float64."""

import pytest
import torch

from pangu.ops.total_norm import total_norm, total_norm_reference


@pytest.mark.parametrize("size", [1, 2**15, 2**18 + 1, 2**22])
def test_the_norm_is_float64s_whatever_the_size(size):
    generator = torch.Generator().manual_seed(size)
    few_large = torch.randn(size, generator=generator).pow(3)
    tensors = [few_large, torch.randn(5, 3, generator=generator).t()]
    found = total_norm(tensors)
    assert found.shape == ()
    assert float(found) == pytest.approx(float(total_norm_reference(tensors)), rel=2e-7)


def test_of_nothing_it_is_0_and_of_one_that_is_none_none():
    assert float(total_norm([])) == 0
    assert torch.isnan(total_norm([torch.ones(2), torch.full((2**19,), torch.nan)]))
    assert torch.isinf(total_norm([torch.full((1,), torch.inf)]))
