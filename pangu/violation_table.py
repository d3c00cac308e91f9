"""Violations and warnings of a configuration, as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.compose import Violation


def console(*, stderr: bool = False) -> Console:
    """The terminal, or 120 columns where the output goes to a file."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=120)


def print_violations(violations: Sequence[Violation]) -> None:
    """One row per violation, to standard error."""
    count = f"{len(violations)} thing{'s' if len(violations) > 1 else ''}"
    console(stderr=True).print(table(violations, f"The configuration has {count} to mend"))


def print_warnings(warnings: Sequence[Violation]) -> None:
    """One line per warning, to standard error."""
    for warning in warnings:
        console(stderr=True).print(Text(f"warning: {warning}"))


def table(violations: Sequence[Violation], title: str) -> Table:
    """Key, value, reason and values that would work, side by side."""
    result = Table(title=title, title_justify="left", show_lines=True)
    result.add_column("key", no_wrap=True)
    for heading in ("value", "why", "what would work"):
        result.add_column(heading, overflow="fold")
    for violation in violations:
        cells = (violation.key, violation.value, violation.reason, violation.suggestion)
        result.add_row(*(Text(str(cell)) for cell in cells))
    return result
