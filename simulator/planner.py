"""What the planner page asks for: a search in words of the page, and one layout of it.

Requests come from a browser, and so from anybody who can reach it: only the names of groups that
this package ships and numbers, words and lists under known keys get as far as the configuration,
no file, no path, no interpolation.
"""

from __future__ import annotations

import re
import shlex
from collections import OrderedDict
from typing import Any

from configs import groups
from configs.schema import Config
from configs.violation import ConfigError, Violation
from simulator.commands import load_plan
from simulator.commands.search import load_search_plan
from simulator.emit import experiment
from simulator.page import fill
from simulator.predict import Forecast, predict
from simulator.report import TEMPLATE, choice_data, report_data, search_data
from simulator.search import Choice, SearchResult, search

TOP = 10  # layouts of a ranking
MOST = 1_000_000  # evaluations that a page waits for
REMEMBERED = 256  # forecasts
MOST_OVERRIDES, LONGEST = 64, 2000  # of a request; characters of one
NAMED = ("model", "hardware", "parallel", "memory", "moe", "simulation")
KEY = re.compile(
    r"devices|train\.(micro_batch_size|global_batch_size|seq_length)"
    r"|(model|moe|parallel|memory|simulation|hardware)(\.\w+)+"
)
VALUE = re.compile(r"[\w.+-]*|\[[\w.+, -]*\]")
FIRST = ["model=pangu_pro_moe", "hardware=ascend_910b_376t", "devices=64"]
FIRST += ["train.global_batch_size=128", "train.seq_length=4096"]


def options() -> dict[str, Any]:
    """What the form offers, and what it starts with."""
    known = groups()
    return {"models": known["model"], "machines": known["hardware"], "first": FIRST}


def checked(overrides: Any) -> list[str]:
    """The overrides of a request, each `key=value`.

    Raises:
        ConfigError: they are no list of these, or one is nothing that a page may ask for.
    """
    if not isinstance(overrides, list) or not all(isinstance(line, str) for line in overrides):
        raise _refused("overrides", type(overrides).__name__, "must be a list of key=value")
    if len(overrides) > MOST_OVERRIDES:
        raise _refused("overrides", len(overrides), f"must be at most {MOST_OVERRIDES}")
    known = groups()
    for line in overrides:
        key, equals, value = line.partition("=")
        if len(line) > LONGEST or not equals or not VALUE.fullmatch(value):
            raise _refused("overrides", line[:100], "must be key=value: a number, a word, [a,b]")
        if key in NAMED and value not in known[key]:
            raise _refused(key, value, "is none of these", ", ".join(known[key]))
        if key not in NAMED and not KEY.fullmatch(key):
            raise _refused(key, value, "is no key of a plan")
    return overrides


class Planner:
    """Searches, and forecasts of single layouts, of which the last are remembered: a layout that a
    search has shown is there when it is clicked."""

    def __init__(self) -> None:
        self._forecasts: OrderedDict[tuple[str, ...], tuple[Config, Forecast]] = OrderedDict()

    def search(self, overrides: list[str]) -> dict[str, Any]:
        """The ranking and the front for checked `overrides`, of which each size that is named is
        pinned; with none that fits, the reason.

        Raises:
            ConfigError: the plan cannot work, or would take too long.
        """
        config = load_search_plan(overrides)
        pinned = frozenset(line.partition("=")[0] for line in overrides)
        found = search(config, pinned=pinned, top=TOP, most=MOST, processes=1)
        data = search_data(found, found.memory_gib)
        for kind, choices in (("ranking", found.choices), ("front", found.pareto)):
            data[kind] = [self._entry(overrides, config, choice) for choice in choices]
        return data | {"title": _title(config), "reason": _reason(found)}

    def page(self, overrides: list[str]) -> str:
        """The page of the layout that checked `overrides` say in full, as `report` writes it.

        Raises:
            ConfigError: it cannot work.
        """
        config, prediction = self.forecast(overrides)
        return fill(TEMPLATE, report_data(config, prediction))

    def forecast(self, overrides: list[str]) -> tuple[Config, Forecast]:
        """The forecast of the layout that checked `overrides` say in full."""
        known = self._forecasts.get(tuple(overrides))
        if known is None:
            config = load_plan(overrides)
            known = config, predict(config)
            self._remember(overrides, *known)
        return known

    def _entry(self, overrides: list[str], base: Config, choice: Choice) -> dict[str, Any]:
        exact = layout_overrides(overrides, base, choice.config)
        self._remember(exact, choice.config, choice.prediction)
        return choice_data(choice) | {
            "overrides": exact,
            "command": f"python -m simulator predict {shlex.join(exact)}",
            "experiment": experiment(choice.config, overrides),
            "breakdown": choice.prediction.breakdown,
        }

    def _remember(self, overrides: list[str], config: Config, prediction: Forecast) -> None:
        self._forecasts[tuple(overrides)] = config, prediction
        self._forecasts.move_to_end(tuple(overrides))
        while len(self._forecasts) > REMEMBERED:
            self._forecasts.popitem(last=False)


def layout_overrides(overrides: list[str], base: Config, chosen: Config) -> list[str]:
    """The user's overrides, and what a search has decided beyond them: together the layout."""
    more = []
    for section in ("parallel", "memory"):
        before, after = vars(getattr(base, section)), vars(getattr(chosen, section))
        more += [
            f"{section}.{name}={_written(value)}"
            for name, value in after.items()
            if value != before[name]
        ]
    if chosen.train.micro_batch_size != base.train.micro_batch_size:
        more.append(f"train.micro_batch_size={chosen.train.micro_batch_size}")
    return [*overrides, *more]


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _reason(found: SearchResult) -> str:
    return "" if found.choices else found.why_none


def _title(config: Config) -> str:
    assert config.hardware is not None
    return f"{config.model.name} on {config.world_size:,} × {config.hardware['name']}"


def _refused(key: str, value: Any, reason: str, suggestion: str = "") -> ConfigError:
    return ConfigError([Violation(key, value, reason, suggestion)])
