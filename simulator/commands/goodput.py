"""`python -m simulator goodput`: useful time of a long run on many devices that fail."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.commands import load_plan, wide_console

if TYPE_CHECKING:
    from simulator.predict import Prediction

SIZES = "1024,4096,16384,32768,65536,100000"
# No failure rate is known to hold elsewhere: a range to read the effect from, one decade wide.
HOURS = "10000,30000,100000"
CHECKPOINT_SECONDS = 30.0


def goodput(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="model=… hardware=… devices=N …: a run, for its useful tokens/s; its checkpoint"
            " stands still for the copy of weights and optimizer state to the host."
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(help=f"Numbers of devices, with commas; without a run, {SIZES}."),
    ] = None,
    mtbf_hours: Annotated[
        str,
        typer.Option(
            help="Mean hours between failures of one device, with commas: your cluster's log knows"
            " (devices × hours / failures). The default is a range, not a measurement."
        ),
    ] = HOURS,
    checkpoint_seconds: Annotated[
        float | None,
        typer.Option(
            help="Training stands still this long for one checkpoint; without a run,"
            f" {CHECKPOINT_SECONDS:g}."
        ),
    ] = None,
    restart_seconds: Annotated[
        float, typer.Option(help="From a failure until training goes on.")
    ] = 600.0,
    interval_seconds: Annotated[
        float | None, typer.Option(help="Work between checkpoints; left out, the best.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Useful share of wall time from failures, checkpoints and restarts."""
    run, copying = _run(overrides, devices) if overrides else (None, None)
    if run:
        devices = str(run.devices)
    costs = (checkpoint_seconds, copying, CHECKPOINT_SECONDS)
    cost = next(seconds for seconds in costs if seconds is not None)
    sizes, hours = _numbers("--devices", devices or SIZES), _numbers("--mtbf-hours", mtbf_hours)
    rows = _rows(sizes, hours, cost, restart_seconds, interval_seconds)
    if run:
        for row in rows:
            row["tokens_per_second"] = run.tokens_per_second * row["goodput"]
    if as_json:
        print(json.dumps({"rows": rows, "checkpoint_seconds": cost}))
        return
    _table(rows, run)
    console = wide_console()
    console.print(f"a checkpoint costs {cost:.3g} s, a restart {restart_seconds:g} s")
    if run and cost == copying:
        console.print("the cost is the copy to the host; a checkpoint is written until the next")
    if mtbf_hours == HOURS:
        console.print("no failure rate given: a range; --mtbf-hours takes your cluster's")


def _rows(
    sizes: list[float], hours: list[float], cost: float, restart: float, interval: float | None
) -> list[dict[str, Any]]:
    """One row for each mean time between failures and number of devices."""
    import numpy as np

    from simulator.goodput import goodput as expected

    rows = []
    for mean in hours:
        result = expected(np.array(sizes), mean, cost, restart, interval)
        columns = {name: np.asarray(value).tolist() for name, value in vars(result).items()}
        rows += [
            {"device_mtbf_hours": mean, **dict(zip(columns, values, strict=True))}
            for values in zip(*columns.values(), strict=True)
        ]
    return rows


def _run(overrides: list[str], devices: str | None) -> tuple[Prediction, float | None]:
    """The forecast of a run, and how long its devices copy a checkpoint to the host; None where
    nobody knows how fast they reach it.

    Raises:
        ConfigError: with everything wrong with the run, or the number of devices said twice.
    """
    from configs.violation import ConfigError, Violation
    from simulator.goodput import checkpoint_seconds
    from simulator.hardware import load_hardware
    from simulator.predict import predict

    if devices is not None:
        reason = "a run has its own: devices=N among its keys"
        raise ConfigError([Violation("--devices", devices, reason)])
    config = load_plan(overrides)
    run = predict(config)
    link = load_hardware(config.hardware).host_link_gbps
    held = max(float(s.memory.weights) + float(s.memory.optimizer) for s in run.stages)
    return run, checkpoint_seconds(held, link) if link else None


def _table(rows: list[dict[str, Any]], run: Prediction | None) -> None:
    from rich.table import Table

    names = ["device fails every", "devices", "failures/day", "checkpoint every", "Young", "Daly"]
    table = Table(*names, "useful", "checkpoints", "lost work", "restarts")
    if run:
        table.title = f"{run.tokens_per_second:,.0f} tokens/s while nothing fails"
        table.title += "" if run.fits else "; [red]does not fit the devices' memory[/]"
        table.add_column("tokens/s")
    for row in rows:
        table.add_row(
            f"{row['device_mtbf_hours']:,.0f} h",
            f"{row['devices']:,.0f}",
            f"{row['failures_per_day']:.2f}",
            f"{row['interval'] / 60:.1f} min",
            f"{row['young'] / 60:.1f}",
            f"{row['daly'] / 60:.1f}",
            f"{row['goodput']:.1%}",
            *(f"{row[name]:.1%}" for name in ("checkpointing", "lost_work", "restarting")),
            *([f"{row['tokens_per_second']:,.0f}"] if run else []),
        )
    wide_console().print(table)


def _numbers(option: str, text: str) -> list[float]:
    """Numbers with commas between them.

    Raises:
        ConfigError: they are not.
    """
    from configs.violation import ConfigError, Violation

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        reason = "must be numbers with commas between them"
        raise ConfigError([Violation(option, text, reason)]) from None
