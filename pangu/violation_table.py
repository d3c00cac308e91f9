"""Violations and warnings of a configuration, as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.violation import Violation

_VALUE, _REASON = 24, 20  # widest value, narrowest reason, in characters


def console(*, stderr: bool = False) -> Console:
    """The terminal, or 120 columns where the output goes to a file."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=120)


def print_violations(violations: Sequence[Violation]) -> None:
    """One row per violation, to standard error."""
    count = f"{len(violations)} thing{'s' if len(violations) > 1 else ''}"
    out = console(stderr=True)
    out.print(table(violations, f"The configuration has {count} to mend", out.width))


def print_warnings(warnings: Sequence[Violation]) -> None:
    """One line per warning, to standard error."""
    for warning in warnings:
        console(stderr=True).print(Text(f"warning: {warning}"))


def table(violations: Sequence[Violation], title: str, width: int) -> Table:
    """Key, value, reason and values that would work, side by side in `width` columns."""
    rows = [(v.key, v.shown, v.reason, v.suggestion) for v in violations]
    result = Table(title=title, title_justify="left", show_lines=True)
    # What would work is there to be copied: the reason makes room for its keys.
    borders = 13
    room = width - borders - max(len(row[0]) for row in rows)
    value = min(max(len("value"), *(len(row[1]) for row in rows)), _VALUE)
    words = max((len(word) for row in rows for word in row[3].split()), default=0)
    result.add_column("key", no_wrap=True)
    result.add_column("value", overflow="fold", max_width=value)
    result.add_column("why", overflow="fold", max_width=max(room - value - words, _REASON))
    result.add_column("what would work", overflow="fold")
    for row in rows:
        result.add_row(*map(Text, row))
    return result
