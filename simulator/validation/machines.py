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
ROWWISE = 0.5  # calibrated, see simulator.validation.split


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
            if row["device"].startswith(CONNECTX_7):
                *inside, between = found["links"]
                found["links"] = [*inside, between | {"bandwidth_gbps": 50.0}]
            return _rowwise(found) if "rowwise" in row["precision"] else found
    raise NotPredictable(f"no preset for the device '{row['device']}'")


def _rowwise(machine: dict[str, Any]) -> dict[str, Any]:
    """Float8 with one scale per row: its kernels and casts leave ROWWISE of the rate that one
    scale per tensor reaches."""
    matmul = machine["matmul"]
    fp8 = {"fp8": ROWWISE * matmul.get("dtype", {}).get("fp8", 1.0)}
    return machine | {"matmul": matmul | {"dtype": matmul.get("dtype", {}) | fp8}}


@cache
def _preset(name: str) -> dict[str, Any]:
    tree = OmegaConf.to_container(OmegaConf.load(PRESETS / f"{name}.yaml"))
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def precision(row: Row) -> str:
    """What a row computes in; bf16 where it does not say."""
    text = row["precision"].lower()
    return next((dtype for pattern, dtype in PRECISIONS if re.search(pattern, text)), "bf16")
