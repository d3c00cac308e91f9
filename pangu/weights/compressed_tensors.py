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
from pangu.weights.quantize import Grid, Scheme, codes_of, float_codes_of

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
    if scheme.floats:
        codes = float_codes_of(weight_RC, grid, scheme).unflatten(1, (-1, 2))
        yield f"{base}.weight_packed", codes[..., 0] | codes[..., 1] << 4
        # The exponent of a power of two, from -127 on.
        yield f"{base}.weight_scale", (grid.scale.log2() + 127).to(torch.uint8)
        return
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
    """Whether codes are packed into words; beside int8 activations they stand as they are, a byte
    each."""
    return not scheme.activation_bits


def description(scheme: Scheme, config: Config, kind: Architecture) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Raises:
        WeightsError: there is no layout of compressed-tensors for the scheme that others run.
    """
    bits = (scheme.weight_bits, scheme.activation_bits)
    rounds = bits[1] and not (bits in ((8, 8), (4, 8)) and scheme.symmetric)
    if scheme.kv_bits:
        raise WeightsError(
            f"{scheme.name} has no layout that other programs read: of keys and values vLLM knows "
            "8-bit floats with one scale a tensor; export the model quantised without KV"
        )
    if bits[0] > 8 or rounds:  # their 4-bit activations have the steps -8 to 7
        raise WeightsError(
            f"{scheme.name} has no layout that other programs read: W8A8, W4A8, or any with A16"
        )
    weights = {
        "num_bits": scheme.weight_bits,
        "type": "float" if scheme.floats else "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size or None,
        "dynamic": False,
    }
    if scheme.floats:
        weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    packed = "mxfp4-pack-quantized" if scheme.floats else "pack-quantized"
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
        "format": packed if packing(scheme) else "int-quantized",
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
