"""The compressed-tensors layout of quantised weights, which vLLM and transformers read.

Shapes: R rows, C columns, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from configs.schema import Config
from pangu.checkpoint.tensor_files import WeightsError
from pangu.weights.architectures import Architecture
from pangu.weights.quantize import Grid, Scheme, codes_of

Tensor = torch.Tensor


def packed(codes_RC: Tensor, bits: int) -> Tensor:
    """Each row's codes, from 0 on, as one string of bits in int32 words, the first code lowest:
    `[R, ceil(C·bits / 32)]`."""
    unsigned = (codes_RC.numpy().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    each = np.unpackbits(unsigned[..., None], axis=-1, bitorder="little", count=bits)
    row = each.reshape(len(unsigned), -1)
    row = np.pad(row, ((0, 0), (0, -row.shape[1] % 32)))
    return torch.from_numpy(np.packbits(row, axis=1, bitorder="little").view("<i4").copy())


def entries(
    name: str, weight_RC: Tensor, scale_RG: Tensor, zero_RG: Tensor, scheme: Scheme
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand for `name`, which ends with `.weight`."""
    base = name.removesuffix(".weight")
    grid = Grid(scale_RG.float(), zero_RG.float())
    codes = codes_of(weight_RC, grid, scheme)
    if packing(scheme):
        yield f"{base}.weight_packed", packed(codes, scheme.weight_bits)
        yield f"{base}.weight_shape", torch.tensor(weight_RC.shape)
        if not scheme.symmetric:
            yield f"{base}.weight_zero_point", packed(zero_RG.T, scheme.weight_bits).T.contiguous()
    else:
        yield f"{base}.weight", codes
    yield f"{base}.weight_scale", scale_RG.contiguous()


def packing(scheme: Scheme) -> bool:
    """Whether codes are packed into words; int8 weights beside int8 activations stand as they
    are."""
    return not scheme.activation_bits


def description(scheme: Scheme, config: Config, kind: Architecture) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Raises:
        WeightsError: there is no layout of compressed-tensors for the scheme that others run.
    """
    bits = (scheme.weight_bits, scheme.activation_bits)
    if scheme.kv_bits or scheme.floats or bits[0] > 8 or (bits[1] and bits != (8, 8)):
        raise WeightsError(
            f"{scheme.name} has no layout that other programs read: W8A8, or any with A16, "
            "and keys and values as they are"
        )
    weights = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size or None,
        "dynamic": False,
    }
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    model = config.model
    later = range(model.num_layers, model.num_layers + model.mtp_num_layers)
    gates = [f"re:.*\\.{kind.block}\\.{kind.router}$", f"re:.*\\.mlp\\.{kind.router}$"]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packing(scheme) else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations if scheme.activation_bits else None,
            }
        },
        "ignore": [
            "lm_head",
            *(["re:.*layer_patch$"] if model.patched_layers else ()),
            *(dict.fromkeys(gates) if model.num_experts else ()),
            *(f"re:model\\.layers\\.{number}\\..*" for number in later),
        ],
    }
