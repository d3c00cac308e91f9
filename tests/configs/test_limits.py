"""Limits stand in the types of the fields, and every number has some."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from configs.check import violations
from configs.compose import load
from configs.limits import Limits, PartAboveZero, bounded, numbers
from configs.schema import Config
from simulator.hardware import Hardware, load_hardware


@pytest.mark.parametrize("tree", [Config, Hardware])
def test_every_number_has_limits(tree: type) -> None:
    found = dict(numbers(tree))
    assert len(found) > 30
    assert [key for key, limits in found.items() if limits is None] == []


def test_a_number_without_limits_would_be_seen() -> None:
    assert dict(numbers(_Unlimited)) == {
        "steps": None,
        "sizes[]": None,
        "part": Limits(0, 1, positive=True),
        "inner.count": Limits(1, 9),
    }


@pytest.mark.parametrize(
    ("value", "reason", "nearest"),
    [
        (0, "must be at least 1", 1),
        (10, "must be at most 9", 9),
        (10**400, "must be at most 9", 9),
        (float("nan"), "must be finite, from 1 to 9", 1),
        (float("inf"), "must be finite, from 1 to 9", 1),
        (-float("inf"), "must be at least 1", 1),
        (9, "", None),
    ],
)
def test_what_is_outside_is_named_with_the_nearest_inside(
    value: float, reason: str, nearest: float | None
) -> None:
    limits = Limits(1, 9)
    assert limits.reason(value) == reason
    if reason:
        assert limits.nearest(value) == nearest


def test_what_is_broken_is_replaced_wherever_it_is() -> None:
    tree, found = bounded(_Unlimited(part=2, inner=_Inner(count=0)))
    assert [(one.key, one.value, one.nearest) for one in found] == [
        ("part", 2, 1),
        ("inner.count", 0, 1),
    ]
    assert (tree.part, tree.inner.count) == (0.5, 3)  # the defaults


OUTSIDE = [
    ("simulation.attention_span=nan", "simulation.attention_span", "finite, from 0 to 1"),
    ("simulation.attention_span=0", "simulation.attention_span", "more than 0"),
    ("train.steps=100000000000000000000000", "train.steps", "at most 1000000000"),
    ("devices=1000000000", "devices", "at most 1048576"),
    ("launch.processes=1000000", "launch.processes", "at most 1024"),
    ("launch.timeout_minutes=0", "launch.timeout_minutes", "more than 0"),
    ("launch.timeout_minutes=1e300", "launch.timeout_minutes", "at most 1000000"),
    ("model.rotary_base=1e300", "model.rotary_base", "at most 1e+18"),
    ("moe.scaling_factor=nan", "moe.scaling_factor", "finite"),
    ("inference.acceptance_rate=1.5", "inference.acceptance_rate", "at most 1"),
    ("parallel.pipeline_layout=[4,-1]", "parallel.pipeline_layout[1]", "at least 0"),
    ("data.validation_blend={a: 0}", "data.validation_blend.a", "more than 0"),
]


@pytest.mark.parametrize(("override", "key", "reason"), OUTSIDE)
@pytest.mark.parametrize("purpose", ["train", "plan"])
def test_numbers_of_the_tree(override: str, key: str, reason: str, purpose: str) -> None:
    found = violations(load([override]), purpose=purpose)  # type: ignore[arg-type]
    assert [v.reason for v in found if v.key == key and reason in v.reason], found


FIGURES = [
    ("overlap.independent=5", "hardware.overlap.independent=5.0: must be at most 1"),
    ("memory_efficiency=2", "hardware.memory_efficiency=2.0: must be at most 1.5"),
    ("attention.forward=2", "hardware.attention.forward=2.0: must be at most 1.5"),
    ("matmul.efficiency=[2,1,1,1]", r"hardware.matmul.efficiency\[0\]=2.0: must be at most 1.5"),
    ("links.0.efficiency.broadcast=2", r"hardware.links\[0\].efficiency.broadcast=2.0: must be at"),
    ("matmul.tiles=[[0,1,0.5]]", r"hardware.matmul.tiles\[0\]\[0\]=0: must be at least 1"),
    ("peak_tflops.bf16=inf", "hardware.peak_tflops.bf16=inf: must be finite"),
    ("vector_tflops=0", "hardware.vector_tflops=0.0: must be more than 0"),
    ("power_w=-1", "hardware.power_w=-1.0: must be more than 0"),
    ("devices_per_node=1e12", "hardware.devices_per_node=1000000000000: must be at most"),
]


@pytest.mark.parametrize(("override", "sentence"), FIGURES)
def test_numbers_of_a_machine(override: str, sentence: str) -> None:
    config = load(["hardware=h100", f"hardware.{override}"])
    with pytest.raises(ValueError, match=f"^{sentence}"):
        load_hardware(config.hardware)


@dataclass
class _Inner:
    count: Annotated[int, Limits(1, 9)] = 3


@dataclass
class _Unlimited:
    steps: int = 1
    sizes: list[float] = field(default_factory=list)
    part: PartAboveZero = 0.5
    inner: _Inner = field(default_factory=_Inner)
