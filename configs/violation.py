"""What is wrong with a configuration, in words that a user can act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a configuration: the key, its value, why, and what would work."""

    key: str
    value: Any
    reason: str
    suggestion: str = ""

    def __str__(self) -> str:
        text = f"{self.key}={self.value}: {self.reason}"
        return f"{text} ({self.suggestion})" if self.suggestion else text


class ConfigError(ValueError):
    """A configuration that cannot be used; `violations` lists everything wrong with it."""

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("\n".join(str(violation) for violation in violations))
        self.violations = violations
