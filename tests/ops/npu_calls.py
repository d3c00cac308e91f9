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

library = torch.library.Library("npu", "IMPL")


def fake_grouped_matmul(
    x, weight, *, group_list=None, split_item=0, group_type=None, group_list_type=0, **rest
):
    assert split_item == 3
    assert group_list_type == 1
    assert group_list.dtype == torch.int64
    if group_type == 0:
        return [Loop.rows(x[0], weight[0], group_list)]
    assert group_type == 2
    return [Loop.weights(x[0].t(), weight[0], group_list)]


def fake_permute(tokens, indices, num_out_tokens=None, padded_mode=False):
    assert indices.dtype == torch.int32
    order = indices.flatten().argsort(stable=True)
    return tokens[order // indices.size(1)], order.argsort(stable=True).to(torch.int32)


def fake_unpermute(
    permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None
):
    assert sorted_indices.dtype == torch.int32
    rows = permuted_tokens[sorted_indices.long()].unflatten(0, probs.shape)
    return (rows * probs[..., None]).sum(1)


def fake_swiglu(input, dim=-1):
    gate, up = input.chunk(2, dim)
    return torch.nn.functional.silu(gate) * up


def fake_rms_norm(input, gamma, epsilon=1e-6):
    factor = torch.rsqrt(input.square().mean(-1, keepdim=True) + epsilon)
    return input * factor * gamma, factor


for name, function in {
    "npu_grouped_matmul": fake_grouped_matmul,
    "npu_moe_token_permute": fake_permute,
    "npu_moe_token_unpermute": fake_unpermute,
    "npu_swiglu": fake_swiglu,
    "npu_rms_norm": fake_rms_norm,
}.items():
    library.impl(name, function, "CPU")

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
