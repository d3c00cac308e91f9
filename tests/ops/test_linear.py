"""Products of linear layers against numpy's, in float64."""

import numpy as np
import pytest
import torch

from pangu import backends
from pangu.backends import cpu
from pangu.ops import linear
from pangu.ops.linear import linear_onednn, linear_torch


@pytest.mark.parametrize("product", [linear_onednn, linear_torch])
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_numpys(product, rows, biased):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1, 48, generator=generator)
    weight = torch.randn(80, 48, generator=generator)
    bias = torch.randn(80, generator=generator) if biased else None
    expected = x.double().numpy() @ weight.double().numpy().T
    if bias is not None:
        expected = expected + bias.double().numpy()
    found = product(x, weight, bias)
    assert found.shape == (rows, 1, 80)
    assert np.abs(found.numpy() - expected).max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_no_rows_at_all_are_torchs(dtype):
    x, weight = torch.randn(3, 8).to(dtype), torch.randn(4, 8).to(dtype)
    assert torch.equal(linear_onednn(x, weight), linear_torch(x, weight))
    assert linear_onednn(torch.empty(0, 8), torch.randn(4, 8)).shape == (0, 4)


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("x86_64", "AMD EPYC", "onednn"),
        ("x86_64", "Intel(R) Xeon(R) Platinum 8480+", "torch"),
        ("aarch64", "Neoverse-N1", "torch"),
    ],
)
def test_processors_that_mkl_was_not_made_for_take_onednn(
    architecture, name, expected, monkeypatch
):
    found = {"architecture": architecture, "cpu_name": name}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert cpu._linear() == expected


def test_the_public_function_takes_this_processes_variant(monkeypatch):
    seen = []
    monkeypatch.setattr(linear, "linear_onednn", lambda *arguments: seen.append(arguments))
    here = backends.current().operators
    for variant in ("torch", "onednn"):
        backends.use(backends.replace(here, linear=variant))
        linear.linear(torch.zeros(1, 2), torch.zeros(3, 2))
    backends.use(here)
    assert len(seen) == 1
