"""What compression leaves behind trains alike in every layout: patches, few bits, carved MLPs and
experts. Two processes are started once for all of them."""

import checkpoint_runs
import gloo
import numpy as np
import pytest
import torch
import torch.distributed as dist
from compression.tiny import compress
from layouts import all_layouts

from pangu.ops.input_transform import InputTransform
from pangu.weights.model_folder import opened

DENSE = ["model.num_layers=2", "model.num_experts=0", "model.ffn_hidden_size=64"]
DEEP = [*DENSE, "model.num_layers=4"]
PATCHED = [*DEEP, "model.patched_layers=[1,2]"]
FEW_BITS = [*DENSE, "model.activation_bits=4"]
CARVED = ["moe.score_function=gated", "moe.router=top_k", "moe.aux_loss_coefficient=0",
          "moe.renormalize=false",
          "moe.router_scale=true", "moe.expert_bias=true", "model.num_layers=2",
          "moe.num_expert_groups=1", "model.num_experts=4", "model.moe_ffn_hidden_size=8",
          "model.shared_expert_ffn_hidden_size=32"]  # fmt: skip
# Two of the experts that tokens choose whole have four parts each, one of them shared.
PARTS = ["moe.expert_parts=4", "moe.shared_parts=1", "moe.active_parts=2", "moe.top_k=6",
         "moe.router_scale=true", "moe.expert_bias=true", "model.num_experts=16",
         "model.num_layers=2"]  # fmt: skip
EP = ["parallel.expert_model_parallel_size=2"]
TP = ["parallel.tensor_model_parallel_size=2"]
TWO = {
    "patch tp": [*PATCHED, *TP],
    "patch tp whole sequences": [*PATCHED, *TP, "parallel.sequence_parallel=false"],
    "patch pp": [*PATCHED, "parallel.pipeline_model_parallel_size=2"],
    "bits tp": [*FEW_BITS, *TP],
    "parts ep": [*PARTS, *EP],
    "parts tp": [*PARTS, *TP],
}
ONE = {"patch": PATCHED, "deep": DEEP, "bits": FEW_BITS, "dense": DENSE, "parts": PARTS}


def trained_on(folder, layouts):
    """(loss, gradient norm) by step of three steps from `folder / "ours"`, by layout."""
    words = [
        *CARVED,
        "model.input_transforms=true",
        f"checkpoint.resume={folder / 'ours'}",
        "train.steps=3",
    ]
    words.append("checkpoint.async_save=false")
    return {
        name: checkpoint_runs.train(folder / name, [*words, *layout])[0]
        for name, layout in layouts.items()
    }


def transformed(size):
    """What a transform makes of each rank's channels of a token, and the gradient of a sum of
    squares in them; `size` ranks."""
    rank = dist.get_rank()
    gloo.parallel(tensor_model_parallel_size=size)
    draw = torch.Generator().manual_seed(1)
    transform = InputTransform(48, 4, dist.group.WORLD)
    transform.left, transform.right, x = (
        torch.randn(s, generator=draw) for s in ((6, 6), (8, 8), (5, 48))
    )
    transform.clip.fill_(0.7)
    part = x.chunk(size, 1)[rank].requires_grad_()
    found = transform(part)
    found.square().sum().backward()
    gloo.drop_groups()
    return found.detach(), part.grad


def both(folder):
    trained = trained_on(folder, {"ep": EP, "tp": TP})
    return trained, all_layouts(TWO, 2, 3), transformed(2)


@pytest.mark.distributed
def test_what_is_smaller_trains_alike_in_every_layout(tmp_path):
    """A run is carved, rounded by FlatQuant, and trained on; the others begin."""
    begun = [*DENSE, "train.steps=2", "checkpoint.async_save=false"]
    gloo.alone(checkpoint_runs.train, tmp_path / "dense", begun)
    (tmp_path / "text").write_text(" ".join(str(number * number) for number in range(200)))
    text = ["--calibration", tmp_path / "text", "--window", 16]
    words = ["carve", tmp_path / "dense", "--experts", "S4A2E8", "--out", tmp_path / "carved"]
    assert compress([*words, *text]) == 0
    words = ["quantize", tmp_path / "carved", "--scheme", "W8A16", "--method", "flatquant"]
    words += ["--tokens", 64, "--epochs", 1, "--out", tmp_path / "ours"]
    assert compress([*words, *text]) == 0
    carved = gloo.alone(trained_on, tmp_path, {"one": []})["one"]
    one = gloo.alone(all_layouts, ONE, 1, 3)
    whole = gloo.alone(transformed, 1)
    (carved_by_two, two, first), (_, _, second) = gloo.run(2, both, tmp_path)
    for one_half, other_half, expected in zip(first, second, whole, strict=True):
        assert torch.allclose(torch.cat([one_half, other_half], 1), expected, atol=1e-5)
    for name, steps in carved_by_two.items():
        assert steps.keys() == carved.keys()
        for step, found in steps.items():
            assert found == pytest.approx(carved[step], rel=1e-5), name
    ours = opened(tmp_path / "ours")[2]
    turns = [name for name in ours.names() if ".input_rounding." in name]
    assert any("experts.activate" in name for name in turns)
    for name in ("one", "ep", "tp"):
        trained = opened(tmp_path / name)[2]
        assert all(torch.equal(trained.read(turn), ours.read(turn)) for turn in turns)
        assert trained.read("decoder.layers.0.mlp.router.router_scale").abs().min() > 0
        moves = trained.read("decoder.layers.0.mlp.router.expert_bias").abs()
        assert 0 < moves.max() < 3.1e-3  # a thousandth a step
    assert one["patch"][0][0] == one["deep"][0][0]  # a patch starts as the identity
    assert one["patch"][2] != one["deep"][2]  # and trains
    rounded, dense = np.array(one["bits"]), np.array(one["dense"])
    for name, found in two.items():
        if name == "bits tp":  # the largest value of a token is that of all ranks' channels
            far = np.abs(rounded - dense).max()
            assert np.abs(np.array(found) - rounded).max() < 0.1 * far
        else:
            expected = np.array(one[name.split()[0]])
            assert np.array(found) == pytest.approx(expected, rel=1e-5), name
