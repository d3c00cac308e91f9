"""One measured row beside its forecast, and what many of them say about a source."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, median


@dataclass(frozen=True)
class Outcome:
    """A measurement and its forecast, in the measurement's own unit.

    `error` is (predicted - measured)/measured of the *time* a step takes, whatever the unit, so
    that a positive error always means a forecast that is too slow (or, of memory, too large).
    """

    id: str
    source: str
    metric: str
    measured: float
    predicted: float | None
    split: str  # calibrated | judged
    assumptions: str = ""  # what the row leaves open and the forecast assumes
    reason: str = ""  # why there is no forecast

    @property
    def error(self) -> float | None:
        if self.predicted is None:
            return None
        if self.metric.endswith(("_ms", "_s", "_GiB")) or self.metric.startswith(
            ("step_time", "peak_allocated")
        ):
            return self.predicted / self.measured - 1.0
        return self.measured / self.predicted - 1.0


@dataclass(frozen=True)
class SourceAccuracy:
    """Errors of one source's rows, as fractions; None where no row could be predicted."""

    source: str
    split: str
    rows: int
    unpredicted: int
    mean_error: float | None
    median_error: float | None
    max_error: float | None
    bias: float | None


def summarise(outcomes: list[Outcome]) -> list[SourceAccuracy]:
    """Accuracy by source, split and kind of measurement (time or memory), in order."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        kind = " (memory)" if "GiB" in outcome.metric else ""
        groups.setdefault((outcome.source + kind, outcome.split), []).append(outcome)
    return [_accuracy(source, split, items) for (source, split), items in groups.items()]


def _accuracy(source: str, split: str, outcomes: list[Outcome]) -> SourceAccuracy:
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    sizes = [abs(error) for error in errors]
    return SourceAccuracy(
        source=source,
        split=split,
        rows=len(errors),
        unpredicted=len(outcomes) - len(errors),
        mean_error=fmean(sizes) if sizes else None,
        median_error=median(sizes) if sizes else None,
        max_error=max(sizes) if sizes else None,
        bias=fmean(errors) if errors else None,
    )
