"""What is wrong with a configuration, in words that a user can act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LONGEST = 200  # characters of a value that are shown


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a configuration: the key, its value, why, and what would work."""

    key: str
    value: Any
    reason: str
    suggestion: str = ""

    @property
    def shown(self) -> str:
        """The value, cut where it is very long."""
        text = str(self.value)
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"

    def __str__(self) -> str:
        text = f"{self.key}={self.shown}: {self.reason}"
        return f"{text} ({self.suggestion})" if self.suggestion else text


class ConfigError(ValueError):
    """A configuration that cannot be used; `violations` lists everything wrong with it."""

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("\n".join(str(violation) for violation in violations))
        self.violations = violations
