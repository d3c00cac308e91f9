"""Each backend's variant of each operator exists, and is the one that the public function takes."""

import ast
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from pangu import backends
from pangu.ops import attention, grouped_matmul, permute, rms_norm, swiglu, weight_gradient

PANGU = Path(backends.__file__).parents[1]
# Where a device's name is data: the configuration's, or a file's, read before there is torch.
BEFORE_TORCH = {"train.py", "doctor.py", "machine_check.py", "local_launch.py", "preflight.py"}
FUNCTIONS = {
    "attention": attention,
    "permute": permute,
    "rms_norm": rms_norm,
    "swiglu": swiglu,
    "weight_gradient": weight_gradient,
}
FUNCTION_NAMES = {"weight_gradient": "add_weight_gradient"}


def take(monkeypatch, **variants):
    """The backend of this process with other variants."""
    here = backends.current()
    other = replace(here, operators=replace(here.operators, **variants))
    monkeypatch.setattr(backends, "_current", other)


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_the_public_function_takes_the_backends_variant(operator, monkeypatch):
    module, seen = FUNCTIONS[operator], []
    monkeypatch.setattr(module, f"{operator}_npu", lambda *a, **k: seen.append((a, k)))
    take(monkeypatch, **{operator: "npu"})
    function = getattr(module, FUNCTION_NAMES.get(operator, operator))
    arguments = {"attention": 3, "permute": 2, "rms_norm": 3, "swiglu": 1, "weight_gradient": 4}
    function(*range(arguments[operator]), **({"scale": 1.0} if operator == "attention" else {}))
    assert len(seen) == 1


def test_grouped_products_follow_the_backend_and_fall_back(monkeypatch):
    x, w = torch.zeros(2, 8), torch.zeros(1, 8, 8)
    for variant, kernels in (
        ("loop", "Loop"),
        ("fused", "Fused"),
        ("npu", "Npu"),
        ("fixed", "Fixed"),
    ):
        take(monkeypatch, grouped_matmul=variant)
        assert grouped_matmul._choose(x, w).__name__ == kernels
    take(monkeypatch, grouped_matmul="fused")
    assert grouped_matmul._choose(x.double(), w.double()).__name__ == "Loop"


def test_variants_are_named_for_every_operator():
    names = asdict(backends.current().operators)
    assert names.pop("linear") in ("torch", "onednn")  # by who made the processor
    assert names == {
        "adamw": "fused",
        "attention": "sdpa",
        "choice": "torch",
        "cross_entropy": "blocks",
        "grouped_matmul": "loop",
        "linear_cross_entropy": "chunks",
        "permute": "torch",
        "rms_norm": "lean",  # keeps its input alone
        "rotary": "torch",
        "routing": "torch",
        "swiglu": "blocks",
        "weight_gradient": "loop",
    }


def compares_a_device(node):
    """Whether a comparison names a device."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    values = [each for side in sides for each in getattr(side, "elts", [side])]
    return any(isinstance(v, ast.Constant) and v.value in ("cpu", "cuda", "npu") for v in values)


def test_nobody_but_backends_compares_the_names_of_devices():
    found = {
        f"{path.relative_to(PANGU)}:{node.lineno}"
        for path in PANGU.rglob("*.py")
        if path.name not in BEFORE_TORCH and path.parent.name != "backends"
        for node in ast.walk(ast.parse(path.read_text()))
        if compares_a_device(node) or (isinstance(node, ast.Attribute) and node.attr == "is_cpu")
    }
    assert found == set()
