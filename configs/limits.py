"""The limits of numbers, which stand in the types of the fields that they bound.

`steps: Annotated[int, Limits(1, 10**9)]` says what may be written; `bounded` reads it, for the
configuration tree and for a machine's figures alike. No number may be NaN or infinite.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Limits:
    """The smallest and the largest value; `positive` takes a smallest of 0 away."""

    low: float
    high: float
    positive: bool = False

    def reason(self, value: float) -> str:
        """Why a value is outside; "" where it is not."""
        if value < self.low or (self.positive and value == self.low):
            return (
                f"must be more than {self.low}" if self.positive else f"must be at least {self.low}"
            )
        if value > self.high and value != float("inf"):
            return f"must be at most {self.high}"
        if self.low <= value <= self.high:
            return ""
        return f"must be finite, from {self.low} to {self.high}"

    def nearest(self, value: float) -> float:
        """The value inside that comes nearest to one outside."""
        if self.high < value < float("inf"):
            return self.high
        return min(1.0, self.high) if self.positive else self.low


@dataclass(frozen=True)
class Broken:
    """A number outside its limits: where, why, and the nearest that is inside."""

    key: str
    value: float
    reason: str
    nearest: float


# Numbers that many fields have.
Ranks = Annotated[int, Limits(1, 2**20)]  # and how many of them do something together
Layers = Annotated[int, Limits(0, 10_000)]
Width = Annotated[int, Limits(0, 2**24)]  # elements; 0: there is none, or it follows from others
Experts = Annotated[int, Limits(0, 2**16)]
Count = Annotated[int, Limits(1, 2**31 - 1)]
Amount = Annotated[int, Limits(0, 2**31 - 1)]  # 0: none, never
Steps = Annotated[int, Limits(1, 10**9)]
Scale = Annotated[float, Limits(0, 1e38)]  # what float32 holds
Part = Annotated[float, Limits(0, 1)]
PartAboveZero = Annotated[float, Limits(0, 1, positive=True)]
# Of a peak: measured ones scatter, and come out above 1 where the peak was measured too.
Efficiency = Annotated[float, Limits(0, 1.5, positive=True)]
Kept = Annotated[float, Limits(0, 10, positive=True)]  # of what another figure says
Positive = Annotated[float, Limits(0, 1e18, positive=True)]
NotNegative = Annotated[float, Limits(0, 1e18)]


def bounded(tree: Any) -> tuple[Any, list[Broken]]:
    """Every number of a dataclass that is outside its limits, and the tree with
    their defaults, or the nearest inside, in their places."""
    found: list[Broken] = []
    return _bounded(tree, type(tree), "", found), found


def numbers(tree: type, prefix: str = "") -> Iterator[tuple[str, Limits | None]]:
    """Every number of a tree of dataclasses, by its key, and its limits."""
    for name, hint in _hints(tree).items():
        yield from _numbers(hint, f"{prefix}{name}")


@cache
def _hints(tree: type) -> dict[str, Any]:
    hints = get_type_hints(tree, include_extras=True)
    return {field.name: hints[field.name] for field in fields(tree)}


def _inner(hint: Any) -> Any:
    """The type beside None, or the one that `typing.Literal` and others stand for."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [one for one in get_args(hint) if one is not types.NoneType]
    return hint


def _limits(hint: Any) -> Limits | None:
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, Limits)), None)


def _bounded(value: Any, hint: Any, key: str, found: list[Broken]) -> Any:
    hint = _inner(hint)
    if limits := _limits(hint):
        if value is None or not (reason := limits.reason(value)):
            return value
        found.append(Broken(key, value, reason, limits.nearest(value)))
        return found[-1].nearest
    if is_dataclass(value) and not isinstance(value, type):
        return _bounded_fields(value, key, found)
    members = get_args(hint)
    if isinstance(value, list) and members:
        return [_bounded(item, members[0], f"{key}[{i}]", found) for i, item in enumerate(value)]
    if isinstance(value, tuple) and len(members) == len(value):
        pairs = enumerate(zip(value, members, strict=True))
        return tuple(_bounded(item, member, f"{key}[{i}]", found) for i, (item, member) in pairs)
    if isinstance(value, dict) and len(members) == 2:
        return {k: _bounded(item, members[1], f"{key}.{k}", found) for k, item in value.items()}
    return value


def _bounded_fields(tree: Any, key: str, found: list[Broken]) -> Any:
    kind: type = type(tree)
    changed, hints = {}, _hints(kind)
    for field in fields(tree):
        old, before = getattr(tree, field.name), len(found)
        hint = hints[field.name]
        new = _bounded(old, hint, f"{key}.{field.name}" if key else field.name, found)
        if len(found) > before:  # a default disturbs the rules about other keys least
            changed[field.name] = new if field.default is MISSING else field.default
    return replace(tree, **changed) if changed else tree


def _numbers(hint: Any, key: str) -> Iterator[tuple[str, Limits | None]]:
    hint = _inner(hint)
    if get_origin(hint) is Annotated:
        if get_args(hint)[0] in (int, float):
            yield key, _limits(hint)
    elif is_dataclass(hint):
        yield from numbers(hint, f"{key}.")  # type: ignore[arg-type]
    elif get_origin(hint) in (list, tuple, dict):
        for member in get_args(hint):
            yield from _numbers(member, f"{key}[]")
    elif hint in (int, float):
        yield key, None
