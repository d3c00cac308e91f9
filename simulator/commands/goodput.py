"""`python -m simulator goodput`: useful time of a long run on many devices that fail."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from simulator.commands import wide_console

SIZES = "1024,4096,16384,32768,65536,100000"
# No failure rate is known to hold elsewhere: a range to read the effect from, one decade wide.
HOURS = "10000,30000,100000"


def goodput(
    devices: Annotated[str, typer.Option(help="Numbers of devices, with commas.")] = SIZES,
    mtbf_hours: Annotated[
        str,
        typer.Option(
            help="Mean hours between failures of one device, with commas: your cluster's log knows"
            " (devices × hours / failures). The default is a range, not a measurement."
        ),
    ] = HOURS,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="Training stands still this long for one checkpoint.")
    ] = 30.0,
    restart_seconds: Annotated[
        float, typer.Option(help="From a failure until training goes on.")
    ] = 600.0,
    interval_seconds: Annotated[
        float | None, typer.Option(help="Work between checkpoints; left out, the best.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Useful share of wall time from failures, checkpoints and restarts."""
    import numpy as np

    from simulator.goodput import goodput as expected

    sizes, hours = _numbers("--devices", devices), _numbers("--mtbf-hours", mtbf_hours)
    rows = []
    for mean in hours:
        result = expected(
            np.array(sizes), mean, checkpoint_seconds, restart_seconds, interval_seconds
        )
        columns = {name: np.asarray(value).tolist() for name, value in vars(result).items()}
        rows += [
            {"device_mtbf_hours": mean, **dict(zip(columns, values, strict=True))}
            for values in zip(*columns.values(), strict=True)
        ]
    if as_json:
        print(json.dumps({"rows": rows}))
        return
    from rich.table import Table

    table = Table(
        "device fails every",
        "devices",
        "failures/day",
        "checkpoint every",
        "Young",
        "Daly",
        "useful",
    )
    for name in ("checkpoints", "lost work", "restarts"):
        table.add_column(name)
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
        )
    console = wide_console()
    console.print(table)
    console.print(f"a checkpoint costs {checkpoint_seconds:g} s, a restart {restart_seconds:g} s")
    if mtbf_hours == HOURS:
        console.print("no failure rate given: a range; --mtbf-hours takes your cluster's")


def _numbers(option: str, text: str) -> list[float]:
    """Numbers with commas between them.

    Raises:
        ConfigError: they are not.
    """
    from configs.compose import ConfigError, Violation

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        reason = "must be numbers with commas between them"
        raise ConfigError([Violation(option, text, reason)]) from None
