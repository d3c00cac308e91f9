"""One measured row beside its forecast, and what many of them say about a source."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, median


@dataclass(frozen=True)
class Outcome:
    """A measurement and its forecast, in the measurement's own unit."""

    id: str
    source: str
    metric: str
    measured: float
    predicted: float | None
    split: str  # calibrated | judged
    hardware: str = ""
    kind: str = "dense"  # dense | moe
    assumptions: str = ""  # what the row leaves open and the forecast assumes
    reason: str = ""  # why there is no forecast
    fits: bool = True  # whether the run is forecast to fit the device that it ran on

    @property
    def remarks(self) -> str:
        """Why there is no forecast, or what it assumes and whether it can be believed."""
        if self.reason or self.fits:
            return self.reason or self.assumptions
        return ", ".join(filter(None, [self.assumptions, "**forecast not to fit the device**"]))

    @property
    def error(self) -> float | None:
        """(predicted - measured)/measured."""
        return None if self.predicted is None else self.predicted / self.measured - 1.0

    @property
    def is_memory(self) -> bool:
        return "GiB" in self.metric

    @property
    def is_time(self) -> bool:
        """Whether more is slower: a latency, not a rate."""
        return self.metric.endswith(("_ms", "_s")) or self.metric.startswith("GPU_hours")

    @property
    def time_error(self) -> float | None:
        """The error as one of time: positive where the forecast is too slow."""
        if self.predicted is None or self.is_memory:
            return None
        return self.error if self.is_time else self.measured / self.predicted - 1.0


@dataclass(frozen=True)
class Accuracy:
    """Errors of several rows, as fractions; None where no row could be predicted."""

    source: str
    split: str  # calibrated | judged | both
    rows: int
    unpredicted: int
    mean_error: float | None
    median_error: float | None
    max_error: float | None
    bias: float | None


def summarise(outcomes: list[Outcome], by_split: bool = False) -> list[Accuracy]:
    """Accuracy by source, memory apart from time; `by_split` keeps calibrated and judged rows
    apart."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        source = f"{outcome.source} (memory)" if outcome.is_memory else outcome.source
        split = outcome.split if by_split else ""
        groups.setdefault((source, split), []).append(outcome)
    return [accuracy(source, items) for (source, _), items in groups.items()]


def accuracy(source: str, outcomes: list[Outcome]) -> Accuracy:
    """Mean, median and largest absolute error, and bias, of some rows."""
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    sizes = [abs(error) for error in errors]
    splits = {outcome.split for outcome in outcomes}
    return Accuracy(
        source=source,
        split=splits.pop() if len(splits) == 1 else "both",
        rows=len(errors),
        unpredicted=len(outcomes) - len(errors),
        mean_error=fmean(sizes) if sizes else None,
        median_error=median(sizes) if sizes else None,
        max_error=max(sizes) if sizes else None,
        bias=fmean(errors) if errors else None,
    )


def by_machine(outcomes: list[Outcome]) -> list[dict[str, object]]:
    """Errors of time by machine and kind of model, of rows that no constant was fitted to: what
    a forecast's error bar is taken from."""
    groups: dict[tuple[str, str], list[float]] = {}
    for outcome in outcomes:
        if outcome.time_error is not None and outcome.split == "judged" and outcome.hardware:
            key = (outcome.hardware, outcome.kind)
            groups.setdefault(key, []).append(outcome.time_error)
    return [
        {
            "hardware": hardware,
            "kind": kind,
            "rows": len(errors),
            "mean_error": fmean(map(abs, errors)),
            "bias": fmean(errors),
        }
        for (hardware, kind), errors in sorted(groups.items())
    ]
