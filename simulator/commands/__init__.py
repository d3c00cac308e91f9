"""The commands of `python -m simulator`, one file each: a function named like its file.

Heavy imports belong inside the functions: only what a command needs is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.schema import Config

if TYPE_CHECKING:
    from rich.console import Console

# In the order in which the help shows them.
COMMANDS = (
    *("predict", "search", "shape", "infer", "speculate", "compare", "goodput", "validate"),
    *("report", "serve"),
)


def load_plan(overrides: list[str]) -> Config:
    """The configuration that a planning command works on.

    Raises:
        ConfigError: with everything wrong with it.
    """
    from configs.check import load_checked

    return load_checked(overrides, purpose="plan")


def wide_console() -> Console:
    """A console whose tables are not squeezed when the output is a file or a pipe."""
    import sys

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 150, highlight=False)
