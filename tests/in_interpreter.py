"""Our Triton kernels on CPU tensors, in Triton's interpreter, beside a reference in float64.

Imported before anything of `pangu.ops.kernels`. `make test` puts Triton where it is looked for
here; TRITON_INTERPRET is set by tests/conftest.py, before anybody can have imported Triton.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on the GPU here: make test-gpu", allow_module_level=True)
sys.path.append(str(Path(__file__).parents[1] / ".triton"))
if sys.platform != "linux":
    pytest.skip("Triton has wheels for Linux alone", allow_module_level=True)
if find_spec("triton") is None:
    raise ImportError("Triton is not here: make .triton/.installed")

# Of the largest value of a result. Kernels round to bfloat16 once, at the end; the interpreter cuts
# off there, which is a whole unit of the last place, where a GPU rounds.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=("float32", "bfloat16"))


def follows(function, reference, inputs, *, dtype):
    """Whether `function` gives the outputs and gradients of `reference`: both are called with
    `inputs` (rounded to the kernel's dtypes), the reference with them in float64."""
    wide = [each.detach().double().requires_grad_() for each in inputs]
    given = [each.detach().requires_grad_() for each in inputs]
    found, expected = _listed(function(*given)), _listed(reference(*wide))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(each.shape, generator=generator).to(dtype) for each in expected]
    upstream = [each.to(ours.dtype) for each, ours in zip(upstream, found, strict=True)]
    theirs = torch.autograd.grad(expected, wide, [each.double() for each in upstream])
    ours = torch.autograd.grad(found, given, upstream)
    for index, (a, b) in enumerate(zip((*found, *ours), (*expected, *theirs), strict=True)):
        scale = b.detach().abs().max().clamp(min=1e-30) if b.numel() else 1.0
        difference = (a.detach().double() - b.detach()).abs() / scale
        assert a.shape == b.shape
        worst = float(difference.max()) if b.numel() else 0.0
        assert worst <= TOLERANCES[dtype], f"result {index}: {worst}"
    for each, gradient in zip(given, ours, strict=True):
        assert gradient.dtype == each.dtype


def _listed(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)
