"""The machine behind a row of a published table, and the precision it ran in."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from simulator.hardware import PRESETS
from simulator.validation.table import Row


class NotPredictable(ValueError):
    """A row that says too little; the message says what is missing."""


DEVICES: tuple[tuple[str, str, dict[str, float]], ...] = (
    (r"A100-40GB", "a100", {"memory_gib": 40.0, "memory_bandwidth_gbps": 1555.0}),
    (r"A100.*PCIe", "a100_pcie", {}),
    (r"A100|Ampere", "a100", {}),
    (r"H100-96GB", "h100_96g", {}),
    (r"GB300", "gb300", {}),
    (r"GB200", "gb200", {}),
    (r"B300", "b300", {}),
    (r"B200", "b200", {}),
    (r"H200", "h200", {}),
    (r"H800", "h800", {}),
    (r"H100", "h100", {}),
    (r"CloudMatrix", "cloudmatrix384", {}),
    (r"910C|A3", "ascend_910c_die", {}),
    (r"910B4", "ascend_910b_280t", {}),
    (r"910B3", "ascend_910b_313t", {}),
    (r"910B|Ascend", "ascend_910b_376t", {}),
)
# One 400 Gb/s adapter per device (the vendor's user guides of these systems); the parts are sold
# with adapters of 800 Gb/s too, which is what the presets have.
CONNECTX_7 = ("DGX-B200", "DGX-GB200")
PRECISIONS = (
    (r"fp4", "fp4"),
    (r"fp8|float8", "fp8"),
    (r"fp16", "fp16"),
    (r"bf16|^$", "bf16"),
    (r"fp32", "fp32"),
)
# FlashAttention 2 on H100 over A100, forward and backward, heads of 128: 335 over 203 TFLOP/s
# (arXiv 2307.08691, figures 4 and 7).
PORTED = 335 / 203
# "1600Gb/s RoCE per node", "4 x 100 Gb/s per node", "400Gb/s CX-7 per GPU"
NETWORK = r"(?:(\d+)\s*[x*]\s*)?(\d+)\s*Gb(?:/s|ps)?\b[^,;()]*?(?:per |/)(node|GPU|NPU|device)\b"


def machine(row: Row) -> dict[str, Any]:
    """The preset of a row's device, with what its system has otherwise.

    Raises:
        NotPredictable: there is none.
    """
    if "not stated" in row["device"]:
        raise NotPredictable(f"the device is '{row['device']}'")
    for pattern, preset, changes in DEVICES:
        if re.search(pattern, row["device"]):
            found = _preset(preset) | changes
            speed = _network(row["device"], found)
            if speed:
                *inside, between = found["links"]
                found["links"] = [*inside, between | {"bandwidth_gbps": speed}]
            if row.mentions("llm-foundry"):
                found = _eager_kernels(found)
            return found
    raise NotPredictable(f"no preset for the device '{row['device']}'")


def _network(device: str, machine: dict[str, Any]) -> float | None:
    """GB/s between nodes, per device, where the row's device says so."""
    stated = re.search(NETWORK, device)
    if stated:
        adapters, speed, of = stated.groups()
        sharing = machine["devices_per_node"] if of == "node" else 1
        return int(adapters or 1) * int(speed) / 8 / sharing
    return 50.0 if device.startswith(CONNECTX_7) else None


def _eager_kernels(machine: dict[str, Any]) -> dict[str, Any]:
    """llm-foundry runs PyTorch's elementwise kernels one by one, and in these benchmarks flash
    attention of 2022 in Triton (`attn_impl: triton`); the a100 preset is calibrated on both. On a
    later machine the former reach the same part of its memory bandwidth. The latter, written for
    the A100, gains what the second generation of the kernel, compiled for both, gained."""
    older, peak = _preset("a100"), machine["peak_tflops"]["bf16"]
    if peak <= older["peak_tflops"]["bf16"]:
        return machine
    part = PORTED * older["peak_tflops"]["bf16"] / peak
    curve = older["attention"]
    rates = {name: part * curve[name] for name in ("forward", "backward")}
    memory = {"memory_efficiency": older["memory_efficiency"]}
    return machine | memory | {"attention": curve | rates}


@cache
def _preset(name: str) -> dict[str, Any]:
    tree = OmegaConf.to_container(OmegaConf.load(PRESETS / f"{name}.yaml"))
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def precision(row: Row) -> str:
    """What a row computes in; bf16 where it does not say."""
    text = row["precision"].lower()
    return next((dtype for pattern, dtype in PRECISIONS if re.search(pattern, text)), "bf16")
