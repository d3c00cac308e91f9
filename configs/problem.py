"""What a broken rule of a configuration says, and the small tools that rules are written with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from configs.schema import Config

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"


@dataclass(frozen=True)
class Problem:
    """A broken rule. `candidates` maps keys to values that might mend it; `hint` says what no
    single value can."""

    rule: str
    key: str
    value: Any
    reason: str
    candidates: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    hint: str = ""


def get(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def with_value(config: Config, key: str, value: Any) -> Config:
    """A copy of `config` with one dotted key changed."""
    section, _, name = key.partition(".")
    if name:
        value = replace(getattr(config, section), **{name: value})
    return replace(config, **{section: value})


def divisors(number: int) -> list[int]:
    """All divisors, ascending; none of 0."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def multiples(step: int, near: int) -> list[int]:
    """The positive multiples of `step` on both sides of `near`."""
    return [n for n in (near // step * step, (near // step + 1) * step) if n > 0]


def divides(config: Config, rule: str, number: str, by: str, reason: str) -> Iterator[Problem]:
    """The value at key `number` must be divisible by the one at key `by`."""
    value, size = get(config, number), get(config, by)
    if value % size:
        options = {by: divisors(value), number: multiples(size, value)}
        yield Problem(rule, by, size, reason.format(value=value, size=size), options)
