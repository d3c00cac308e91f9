"""Run by test_npu_contract with torch-npu and stand-ins: prints the operators that hold."""

import torch
import torch_npu  # noqa: F401 - registers the operators

from pangu import backends
from pangu.ops.grouped_matmul import Loop, Npu, grouped_matmul
from pangu.ops.permute import (
    permute_npu,
    permute_reference,
    plan,
    unpermute_npu,
    unpermute_reference,
)
from pangu.ops.rms_norm import rms_norm_npu, rms_norm_reference
from pangu.ops.swiglu import swiglu_npu, swiglu_reference
from tests.npu import operators  # noqa: F401 - registers kernels for the CPU

backends.select("cpu")
torch.manual_seed(0)
close = torch.testing.assert_close

counts = torch.tensor([3, 0, 5])
x = torch.randn(8, 4, requires_grad=True)
w = torch.randn(3, 4, 6, requires_grad=True)
upstream = torch.randn(8, 6)
outputs = [grouped_matmul(x, w, counts, kernels) for kernels in (Npu, Loop)]
close(*outputs)
close(*(torch.autograd.grad(y, (x, w), upstream) for y in outputs))
meta = [torch.empty(8, 4, device="meta"), torch.empty(3, 4, 6, device="meta")]
shape = torch.ops.npu.npu_grouped_matmul(
    [meta[0]],
    [meta[1]],
    group_list=counts.to("meta"),
    split_item=3,
    group_type=0,
    group_list_type=1,
)[0].shape
assert shape == (8, 6)
print("grouped_matmul")

permutation = plan(torch.rand(5, 3).topk(2).indices, 3)
tokens, rows = torch.randn(5, 4), torch.randn(10, 4)
close(permute_npu(tokens, permutation), permute_reference(tokens, permutation))
close(unpermute_npu(rows, permutation), unpermute_reference(rows, permutation))
print("permute")

h, weights = torch.randn(6, 8), torch.rand(6)
close(swiglu_npu(h), swiglu_reference(h))
close(swiglu_npu(h, weights), swiglu_reference(h, weights))
print("swiglu")

hidden, gain = torch.randn(3, 8), torch.rand(8)
close(rms_norm_npu(hidden, gain, 1e-5), rms_norm_reference(hidden, gain, 1e-5))
print("rms_norm")
