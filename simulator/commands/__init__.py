"""The commands of `python -m simulator`, one file each: a function named like its file.

Heavy imports belong inside the functions: only what a command needs is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.schema import Config

if TYPE_CHECKING:
    from rich.console import Console

    from simulator.memory_policy import Policy

# In the order in which the help shows them.
COMMANDS = (
    *("predict", "search", "shape", "infer", "speculate", "compare", "goodput", "validate"),
    *("report", "serve"),
)
MOST_VALUES = 100_000  # of one range


def load_plan(overrides: list[str]) -> Config:
    """The configuration that a planning command works on.

    Raises:
        ConfigError: with everything wrong with it.
    """
    return load_settled(overrides)[0]


def load_settled(overrides: list[str]) -> tuple[Config, Policy | None]:
    """That configuration, with what `memory=auto` has chosen in it.

    Raises:
        ConfigError: with everything wrong with it.
    """
    from configs.check import load_checked
    from simulator.memory_policy import settle

    return settle(load_checked(overrides, purpose="plan"))


def wide_console() -> Console:
    """A console whose tables are not squeezed when the output is a file or a pipe."""
    import sys

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 150, highlight=False)


def take(key: str, overrides: list[str]) -> tuple[list[str], list[str]]:
    """The values of `key=a,b` and the other overrides."""
    values = [
        value.strip()
        for line in overrides
        if line.startswith(f"{key}=")
        for value in line.partition("=")[2].split(",")
    ]
    return values, [line for line in overrides if not line.startswith(f"{key}=")]


def values(option: str, text: str) -> list[int]:
    """`FROM:TO:STEP` with both ends, or `A,B,…`, as whole numbers.

    Raises:
        ConfigError: it is neither, holds nothing positive, or more than a search could try.
    """
    from configs.violation import ConfigError, Violation

    try:
        if ":" in text:
            first, last, *step = (int(part) for part in text.split(":"))
            spread = range(first, last + 1, step[0] if step else 1)
            good = len(step) < 2 and len(spread) <= MOST_VALUES
            found = list(spread) if good else []
        else:
            found, good = [int(part) for part in text.split(",")], True
    except (ValueError, OverflowError):
        found, good = [], False
    if not good or not found or min(found) < 1:
        wanted = "must be FROM:TO:STEP or A,B of positive whole numbers"
        raise ConfigError([Violation(option, text, wanted)])
    return sorted(set(found))
