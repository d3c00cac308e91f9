"""SmolLM2-135M in fewer bits, briefly; the whole ladders: `benchmarks/compression_ladder.py`."""

import copy
import math
import random
from pathlib import Path

import numpy as np
import torch
from gloo import leave
from real_models import smollm2

from pangu.compression.quantization import Rounding, rounded, scheme_for
from pangu.compression.texts import Texts, judge
from pangu.ops.input_transform import InputTransform
from pangu.trained_model import loaded
from pangu.weights import flatquant
from pangu.weights import quantize as grids
from pangu.weights.convert import import_model
from pangu.weights.hadamard import hadamard
from pangu.weights.quantize_layers import _call

TEXTS = Texts(Path(random.__file__), tokens=384, window=128)


def turned_by(layer, scheme, factor):
    """Every matrix rounded behind a turn by `factor(size)` of both parts, the inverse by a dense
    product in numpy."""
    for name, module in layer.named_modules():
        if isinstance(module, InputTransform):
            linear = layer.get_submodule(name.removesuffix(".input_rounding"))
            left, right = (factor(len(part)) for part in (module.left, module.right))
            turn = np.kron(left, right)
            weight = torch.from_numpy(linear.weight.double().numpy() @ np.linalg.inv(turn).T)
            grid = grids.grid_of(weight.float(), scheme, torch.float32)
            linear.weight.copy_(grids.rounded(weight.float(), grid, scheme))
            module.left.copy_(torch.from_numpy(left))
            module.right.copy_(torch.from_numpy(right))
            module.bits = scheme.activation_bits


@torch.no_grad()
def errors_of_a_layer(model, ids):
    """Mean squares of what 4-bit weights and activations do to the output of a real layer, by
    method, on the tokens it was calibrated on."""
    scheme = grids.scheme_of("W4A4", 128, {576, 1536})
    calls = [_call(model, torch.tensor(ids[start : start + 128])) for start in (0, 128, 256)]
    layer, following = model.decoder.layers[:2]
    for call in calls:
        call["hidden_states"] = layer(**call)[0]
    before = copy.deepcopy(following.state_dict())
    expected = [following(**call)[0] for call in calls]
    ways = {
        "rtn": lambda: turned_by(following, scheme, np.eye),
        "hadamard": lambda: turned_by(following, scheme, hadamard),
        "flatquant": lambda: flatquant.learn(following, calls, scheme, torch.float32, 5),
    }
    found = {}
    for name, way in ways.items():
        way()
        outputs = [following(**call)[0] for call in calls]
        pairs = zip(outputs, expected, strict=True)
        found[name] = sum(float((one - other).square().mean()) for one, other in pairs)
        following.load_state_dict(before)
    flatquant._round_inputs(following, 0)
    return found


def test_few_bits_of_a_real_model(tmp_path):
    folder, found = tmp_path / "ours", {}
    import_model(smollm2(), folder)
    leave()
    with loaded(folder, "cpu", input_transforms=True) as trained:
        errors = errors_of_a_layer(trained.model, TEXTS.judging_ids(trained.tokenizer))
        found["float"] = judge("", trained, TEXTS, iter).nats_per_token
        for scheme in ("W8A16", "W3A16"):  # one after the other, the second from the first
            rounding = Rounding(scheme, "rtn")
            grid = scheme_for(trained.model, rounding)
            rounded(trained, folder, grid, rounding, TEXTS, iter)
            found[scheme] = judge("", trained, TEXTS, iter).nats_per_token
    assert errors["flatquant"] < 0.8 * errors["hadamard"] < 0.8 * errors["rtn"]
    assert math.exp(abs(found["W8A16"] - found["float"])) < 1.02
    assert math.exp(found["W3A16"] - found["float"]) > 1.5
