"""Which of a machine's figures a forecast hangs on: each a tenth lower and a tenth higher."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from configs.schema import Config
from configs.violation import ConfigError
from simulator.predict import predict

STEP = 0.1
# What a machine is made of, not how fast it is.
COUNTED = {
    "devices",
    "devices_per_node",
    "devices_per_port",
    "units",
    "tiles",
    "size",
    "memory_gib",
}
COUNTED |= {"power_w", "price_per_hour", "evidence"}
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Effect:
    """Relative change of the step's seconds with a figure 10 % lower and higher; None where no
    machine has such a figure. `evidence` is the preset's grade of it."""

    figure: str
    lower: float | None
    higher: float | None
    evidence: str

    @property
    def size(self) -> float:
        return max(abs(self.lower or 0.0), abs(self.higher or 0.0))


def sensitivity(config: Config) -> list[Effect]:
    """The effect of every figure of `config`'s machine on its forecast, largest first; figures
    without any are left out.

    Raises:
        ConfigError: there is no forecast.
    """
    step = predict(config).step_seconds
    assert config.hardware is not None
    evidence = config.hardware["evidence"]
    effects = []
    for path in figures(config.hardware):
        lower, higher = (_changed(config, path, factor, step) for factor in (1 - STEP, 1 + STEP))
        effect = Effect(title(config.hardware, path), lower, higher, evidence.get(path[0], ""))
        if effect.size > 1e-6:
            effects.append(effect)
    return sorted(effects, key=lambda effect: -effect.size)


def figures(tree: Any, path: Path = ()) -> Iterator[Path]:
    """Where the figures of a preset stand; a curve (a list of numbers) is one."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name not in COUNTED:
                yield from figures(value, (*path, name))
    elif isinstance(tree, list) and not _curve(tree):
        for index, value in enumerate(tree):
            yield from figures(value, (*path, index))
    elif _curve(tree) or (_number(tree) and tree):
        yield path


def title(tree: Any, path: Path) -> str:
    """`links.NVLink 4.bandwidth_gbps`: a part of a list by its name."""
    words = []
    for part in path:
        tree = tree[part]
        words.append(str(part) if isinstance(part, str) else str(tree.get("name", part)))
    return ".".join(words)


def _changed(config: Config, path: Path, factor: float, step: float) -> float | None:
    machine = copy.deepcopy(config.hardware)
    place: Any = machine
    for part in path[:-1]:
        place = place[part]
    value = place[path[-1]]
    place[path[-1]] = [factor * x for x in value] if isinstance(value, list) else factor * value
    try:
        return predict(replace(config, hardware=machine)).step_seconds / step - 1
    except ConfigError:
        return None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _curve(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_number, value))
