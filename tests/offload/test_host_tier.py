"""Activations in a file and back, on a stack of plain torch layers."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F

from pangu.backends.host_tier import FileTier
from pangu.offload.swap import Swap

WIDTH, ROWS, LAYERS = 64, 256, 6


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def losses(layers, inputs, swap):
    """Two micro-batches under way: both forward, then the first one's backward first."""
    outputs = []
    for x in inputs:
        for layer in layers:
            if swap is None:
                x = layer(x)
                continue
            swap.begin_layer()
            swap.own(x)
            with swap.inside("mlp"):
                x = layer(x)
        outputs.append(x.square().mean())
    if swap is not None:
        assert swap._leaving_bytes <= swap._window
    for output in outputs:
        output.backward()
        if swap is not None:
            assert 0 <= swap._ahead_bytes <= swap._window + ROWS * 2 * WIDTH * 4
    return [output.item() for output in outputs]


def test_gradients_are_those_of_tensors_that_stayed(tmp_path):
    torch.manual_seed(0)
    kept = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
    moved = copy.deepcopy(kept)
    inputs = [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2)]
    tier = FileTier(tmp_path)
    swap = Swap(tier, ["mlp"], [], moved.parameters())
    for _ in range(3):
        assert losses(kept, inputs, None) == losses(moved, inputs, swap)
        end = tier._end
    for one, other in zip(kept.parameters(), moved.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    # A layer's own: gate and up together, silu's output, the product of both; two micro-batches.
    own = ROWS * WIDTH * 4 * (2 + 1 + 1)
    assert end == tier._end == 2 * LAYERS * own  # places are used again
    assert swap._window == own
    assert os.listdir(tmp_path) == []  # nothing is left behind, whatever ends the process


@pytest.mark.parametrize(("owner", "size"), [("mlp", 0), ("elsewhere", ROWS * WIDTH * 4)])
def test_what_is_its_own_leaves_and_what_is_not_stays(tmp_path, owner, size):
    swap = Swap(FileTier(tmp_path), ["mlp"], ["elsewhere"], [])
    kept = []
    x = torch.randn(ROWS, WIDTH, requires_grad=True) * 2
    swap.own(x, owner)
    swap.pack, packed = lambda tensor: kept.append(packed(tensor)) or kept[-1], swap.pack
    with swap.inside("mlp"):
        x.square().sum().backward()
    assert sum(each.nbytes for each in kept if isinstance(each, torch.Tensor)) == size
