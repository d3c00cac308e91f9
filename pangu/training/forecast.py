"""What the simulator expects of a run, said at its start and compared at its end."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from configs.schema import Config
from configs.violation import ConfigError
from simulator.api import Forecast, predict

WARM_UP = 2  # steps of a run that are slower than the rest: first allocations, first messages


def forecast(config: Config, devices: int) -> Forecast | str | None:
    """The forecast of a run on `devices` ranks, or why there is none; None where the
    configuration names no `hardware`."""
    if not config.hardware:
        return None
    try:
        return predict(replace(config, devices=devices))
    except ConfigError as error:
        return str(error.violations[0])


def announce(expected: Forecast | str) -> str:
    """One line for the start of a run."""
    if isinstance(expected, str):
        return f"no forecast: {expected}"
    line = f"forecast: {expected.step_seconds:.3g} s per step, {expected.peak_memory_gib:.2f} GiB"
    if not expected.fits:
        line += f", which does not fit into {expected.memory_gib:.1f} GiB"
    return line


def compare(expected: Forecast, rows: list[dict[str, Any]]) -> str | None:
    """One line for the end of a run with the metrics `rows`; None where it was too short."""
    steps = [row for row in rows if "step_seconds" in row][WARM_UP:]
    if not steps:
        return None
    seconds = statistics.median(row["step_seconds"] for row in steps)
    memory = max(row["memory_gib"] for row in steps)
    return (
        f"measured {seconds:.3g} s per step vs forecast {expected.step_seconds:.3g} s "
        f"({expected.step_seconds / seconds - 1:+.0%}); measured {memory:.2f} GiB vs forecast "
        f"{expected.peak_memory_gib:.2f} GiB ({expected.peak_memory_gib / memory - 1:+.0%})"
    )
