"""`python -m simulator report`: a forecast or a search as an interactive page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from simulator.commands import load_plan


def report(
    overrides: Annotated[
        list[str],
        typer.Argument(help="model=… hardware=… devices=N parallel.…=… train.…=… as in training"),
    ],
    search: Annotated[
        bool, typer.Option("--search", help="Search for the layout; show the Pareto front.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("forecast.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write one HTML page: schedule, memory by stage, breakdown, and what a search found."""
    from configs.violation import ConfigError, Violation
    from simulator.commands.search import load_search_plan, progress_bar
    from simulator.predict import predict
    from simulator.report import write_report
    from simulator.search import search as find

    found = None
    if search:
        config = load_search_plan(overrides)
        pinned = frozenset(line.lstrip("+").partition("=")[0] for line in overrides)
        bar = progress_bar("evaluating layouts", quiet=as_json)
        found = find(config, pinned=pinned, progress=bar)
        if not found.choices:
            raise ConfigError([Violation("devices", config.world_size, found.why_none)])
        config, prediction = found.choices[0].config, found.choices[0].prediction
    else:
        config = load_plan(overrides)
        prediction = predict(config)
    write_report(out, config, prediction, found)
    if as_json:
        print(json.dumps({"file": str(out), **prediction.to_json()}))
    else:
        print(f"wrote {out}")
