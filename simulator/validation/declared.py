"""What a table declares about its engine in columns of its own.

A column named like a configuration key (`simulation.fused_attention`, `parallel.zero_stage`,
`moe.router`, `hardware.memory_efficiency`) sets that key for its row, over whatever the rules of
`simulator.validation.engine` derive from the row's source and notes; an empty cell leaves them.
`core_version` is the version of megatron-core, which decides what its model FLOPs count.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from configs.compose import MOVED
from configs.schema import Config
from configs.violation import ConfigError, Violation
from simulator.validation.table import Row

GROUPS = ("model", "moe", "parallel", "memory", "train", "simulation")


def with_declared(config: Config, row: Row) -> Config:
    """`config` with the keys that the row declares.

    Raises:
        ConfigError: there is no such key, or it cannot have this value.
    """
    groups: dict[str, dict[str, Any]] = {}
    machine = config.hardware
    for key, text in row.declared.items():
        group, _, name = key.partition(".")
        value = _value(key, text)
        if group == "hardware":
            machine = _set(machine or {}, name.split("."), value)
        elif group in GROUPS and name in {field.name for field in fields(getattr(config, group))}:
            groups.setdefault(group, {})[name] = value
        else:
            now = f"is now {MOVED[key]}" if key in MOVED else "no such key of the configuration"
            raise _error(key, text, now)
    changed = {
        group: _checked(group, getattr(config, group), values) for group, values in groups.items()
    }
    return replace(config, hardware=machine, **changed)


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise _error(key, text, "not a value") from None


def _set(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy of `tree` with one leaf changed."""
    first, *rest = path
    if not rest:
        return tree | {first: value}
    inner = tree.get(first)
    return tree | {first: _set(inner if isinstance(inner, dict) else {}, rest, value)}


def _checked(group: str, default: Any, values: dict[str, Any]) -> Any:
    try:
        return TypeAdapter(type(default)).validate_python(asdict(default) | values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([group, *map(str, first["loc"])])
        raise _error(name, str(first.get("input")), first["msg"].lower()) from None


def _error(key: str, text: str, reason: str) -> ConfigError:
    return ConfigError([Violation(f"--table, column {key}", text, reason)])
