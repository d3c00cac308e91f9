"""`python -m simulator compare`: models and machines side by side."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.commands import load_plan, take, wide_console

if TYPE_CHECKING:
    from simulator.compare import Pair


def compare(
    overrides: Annotated[
        list[str],
        typer.Argument(
            help="model=A,B hardware=X,Y devices=N train.…=…; parallel.…=… pins a size,"
            " parallel=NAME is the layout of every pair"
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Every model on every machine: the best layout, speed, MFU, memory, energy and cost."""
    from configs.violation import ConfigError, Violation
    from simulator.commands.search import load_search_plan, progress_bar
    from simulator.compare import compare as side_by_side

    models, others = take("model", overrides)
    machines, others = take("hardware", others)
    _check_names(models, machines)
    given = any(line.lstrip("+").startswith(("parallel=", "experiment=")) for line in others)
    read = load_plan if given else load_search_plan
    plans = [
        (model, machine, partial(read, [f"model={model}", f"hardware={machine}", *others]))
        for model in models
        for machine in machines
    ]
    pinned = frozenset(line.lstrip("+").partition("=")[0] for line in others)
    progress = progress_bar("comparing", quiet=as_json)
    pairs = side_by_side(plans, given=given, pinned=pinned, progress=progress)
    if all(pair.prediction is None for pair in pairs):
        reason = "; ".join(dict.fromkeys(pair.reason for pair in pairs))
        raise ConfigError([Violation("compare", f"{len(pairs)} pairs", f"none works: {reason}")])
    if as_json:
        print(json.dumps({"pairs": [pair.to_json() for pair in pairs]}))
    else:
        _show(pairs)


def _check_names(models: list[str], machines: list[str]) -> None:
    """A misspelt name stops the comparison; a pair that does not work only leaves a gap."""
    from configs import groups
    from configs.violation import ConfigError, Violation

    wrong = []
    known = groups()
    for key, values in (("model", models), ("hardware", machines)):
        names = ", ".join(known[key])
        if not any(values):
            wrong.append(Violation(key, "", "nothing to compare", f"{key}=A,B of {names}"))
        wrong += [
            Violation(key, value, f"there is no file configs/{key}/{value}.yaml", f"one of {names}")
            for value in filter(None, values)
            if value not in known[key] and not value.endswith((".yaml", ".yml"))
        ]
    if wrong:
        raise ConfigError(wrong)


def _show(pairs: list[Pair]) -> None:
    from rich.table import Table

    from simulator.words import layout_words

    console = wide_console()
    table = Table(title="models × hardware; hours, energy and cost per trillion tokens")
    for name in ("model", "hardware"):
        table.add_column(name, no_wrap=True)
    table.add_column("layout", min_width=20)
    for name in ("tokens/s/device", "MFU", "TFLOPS", "peak GiB", "device h", "MWh", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in pairs:
        p = pair.prediction
        if p is None or pair.config is None:
            table.add_row(pair.model, pair.hardware, f"[red]{pair.reason}[/]")
            continue
        memory = f"{p.peak_memory_gib:.1f} of {p.memory_gib:.0f}"
        table.add_row(
            pair.model,
            pair.hardware,
            layout_words(pair.config),
            f"{p.tokens_per_second_per_device:,.0f}",
            f"{p.mfu:.1%}",
            f"{p.peak_tflops:.1f} {p.peak_dtype}",
            memory if p.fits else f"[red]{memory}: too much[/]",
            f"{pair.device_hours:,.0f}",
            "–" if pair.energy_mwh is None else f"{pair.energy_mwh:,.0f}",
            "–" if pair.cost is None else f"{pair.cost:,.0f}",
        )
    console.print(table)
    for figure, unknown in (
        ("power", [pair.hardware for pair in pairs if pair.power_w is None]),
        ("price", [pair.hardware for pair in pairs if pair.price_per_hour is None]),
    ):
        if unknown:
            names = ", ".join(dict.fromkeys(unknown))
            key = "hardware.power_w" if figure == "power" else "hardware.price_per_hour"
            console.print(f"no {figure} is known of {names}: add {key}=…")
    console.print("energy is that of the devices at their rated power, without hosts and cooling")
