"""`python -m simulator goodput`: useful time of a long run on many devices that fail."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.commands import load_plan, wide_console

if TYPE_CHECKING:
    from simulator.predict import Forecast

SIZES = "1024,4096,16384,32768,65536,100000"
# No failure rate is known to hold elsewhere: a range to read the effect from, one decade wide.
HOURS = "10000,30000,100000"
CHECKPOINT_SECONDS = 30.0
OPTIONS = {
    "devices": "--devices",
    "device_mtbf_hours": "--mtbf-hours",
    "checkpoint_seconds": "--checkpoint-seconds",
    "restart_seconds": "--restart-seconds",
    "interval_seconds": "--interval-seconds",
}


def goodput(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="model=… hardware=… devices=N …: a run, for its useful tokens/s; its checkpoint"
            " stands still for the copy of weights and optimizer state to the host, and is then"
            " written at hardware.storage_gbps (GB/s per device)."
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
    run = _run(overrides, devices) if overrides else None
    if run:
        devices = str(run.forecast.devices)
    copying = run.copy_seconds if run else None
    costs = (checkpoint_seconds, copying, CHECKPOINT_SECONDS)
    cost = next(seconds for seconds in costs if seconds is not None)
    sizes, hours = _numbers("--devices", devices or SIZES), _numbers("--mtbf-hours", mtbf_hours)
    written = run.write_seconds if run else 0.0
    rows = _rows(sizes, hours, (cost, restart_seconds, interval_seconds, written))
    if run:
        for row in rows:
            row["tokens_per_second"] = run.forecast.tokens_per_second * row["goodput"]
    if as_json:
        fits = {"fits": run.forecast.fits} if run else {}
        found = {"rows": rows, "checkpoint_seconds": cost, "write_seconds": written}
        print(json.dumps(found | fits))
        return
    _table(rows, run.forecast if run else None)
    console = wide_console()
    console.print(f"a checkpoint costs {cost:.3g} s, a restart {restart_seconds:g} s")
    if run:
        _explain(run, copied=cost == copying)
    if mtbf_hours == HOURS:
        console.print("no failure rate given: a range; --mtbf-hours takes your cluster's")


def _explain(run: Run, *, copied: bool) -> None:
    console = wide_console()
    if copied:
        console.print("the cost is the copy to the host; a checkpoint is written until the next")
    if run.write_seconds:
        console.print(f"writing {run.written_gib:,.0f} GiB takes {run.write_seconds:.3g} s")
    else:
        console.print("how long writing takes is not known: hardware.storage_gbps=GB/s per device")


@dataclass(frozen=True)
class Run:
    """The forecast of a run and of its checkpoint: GiB, seconds of copying it to the host (None
    where nobody knows how fast the devices reach it) and of writing it (0: likewise)."""

    forecast: Forecast
    written_gib: float
    copy_seconds: float | None
    write_seconds: float


def _run(overrides: list[str], devices: str | None) -> Run:
    """What the keys `overrides` describe.

    Raises:
        ConfigError: with everything wrong with the run, or the number of devices said twice.
    """
    from configs.violation import ConfigError, Violation
    from simulator.goodput import checkpoint_bytes, checkpoint_seconds
    from simulator.hardware import load_hardware
    from simulator.parameters import count_parameters
    from simulator.predict import predict

    if devices is not None:
        reason = "a run has its own: devices=N among its keys"
        raise ConfigError([Violation("--devices", devices, reason)])
    config = load_plan(overrides)
    run = predict(config)
    hardware = load_hardware(config.hardware)
    link, storage = hardware.host_link_gbps, hardware.storage_gbps * run.devices
    held = max(float(s.memory.weights) + float(s.memory.optimizer) for s in run.stages)
    written = checkpoint_bytes(count_parameters(config).allocated, 2.0)
    return Run(
        run,
        written / 2**30,
        checkpoint_seconds(held, link) if link else None,
        checkpoint_seconds(written, storage) if storage else 0.0,
    )


def _rows(
    sizes: list[float], hours: list[float], seconds: tuple[float, float, float | None, float]
) -> list[dict[str, Any]]:
    """One row for each mean time between failures and number of devices; `seconds` of a
    checkpoint, a restart, an interval and of writing.

    Raises:
        ConfigError: mistakes, under the names of the options.
    """
    import numpy as np

    from configs.violation import ConfigError
    from simulator.goodput import goodput as expected

    rows = []
    for mean in hours:
        try:
            result = expected(np.array(sizes), mean, *seconds[:3], write_seconds=seconds[3])
        except ConfigError as error:
            renamed = [replace(v, key=OPTIONS.get(v.key, v.key)) for v in error.violations]
            raise ConfigError(renamed) from None
        columns = {name: np.asarray(value).tolist() for name, value in vars(result).items()}
        rows += [
            {"device_mtbf_hours": mean, **dict(zip(columns, values, strict=True))}
            for values in zip(*columns.values(), strict=True)
        ]
    return rows


def _table(rows: list[dict[str, Any]], run: Forecast | None) -> None:
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
