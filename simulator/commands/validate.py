"""`python -m simulator validate`: forecasts against published measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.commands import wide_console

if TYPE_CHECKING:
    from collections.abc import Iterable

    from simulator.validation.rows import Accuracy, Outcome
    from simulator.validation.table import Row


def validate(
    table: Annotated[
        Path | None, typer.Option(help="More rows, in the columns of the packaged table.")
    ] = None,
    split: Annotated[
        bool, typer.Option("--split", help="Calibrated and judged rows apart, and the rules.")
    ] = False,
    rows: Annotated[bool, typer.Option("--rows", help="Every row, not sources alone.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a scatter plot (PNG).")] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Rewrite docs/simulator-accuracy.md and error bars.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict published training and serving runs, and show the error of each source."""
    from rich.progress import track

    from configs.violation import ConfigError, Violation
    from simulator.plot_file import must_be_drawable
    from simulator.validation.measure import outcomes
    from simulator.validation.rows import summarise
    from simulator.validation.serving import serving_outcomes
    from simulator.validation.table import PACKAGED

    if publish and table:
        raise ConfigError([Violation("--publish", table, "publishes the packaged table alone")])
    must_be_drawable(plot)
    console = wide_console()
    console.stderr = True

    def progress(items: list[Row]) -> Iterable[Row]:
        return track(items, "predicting", console=console, transient=True)

    training = outcomes(table or PACKAGED, progress)
    serving = [] if table else serving_outcomes()
    found = training + serving
    if plot:
        from simulator.validation.publish import scatter

        scatter(found, plot)
    if publish:
        from simulator.validation.publish import publish as write

        write(training, serving)
    sources = summarise(found, by_split=split)
    if as_json:
        print(json.dumps(_json(sources, found, split)))
        return
    _show(sources, found if rows else [], split)


def _json(sources: list[Accuracy], found: list[Outcome], split: bool) -> dict[str, object]:
    from simulator.validation.split import CALIBRATION

    result: dict[str, object] = {
        "sources": [vars(entry) for entry in sources],
        "rows": [
            {
                "id": x.id,
                "source": x.source,
                "metric": x.metric,
                "split": x.split,
                "measured": x.measured,
                "predicted": x.predicted,
                "error": x.error,
                "reason": x.reason,
                "assumptions": x.assumptions,
                "fits": x.fits,
            }
            for x in found
        ],
    }
    if split:
        result["calibration"] = [vars(rule) for rule in CALIBRATION]
    return result


def _show(sources: list[Accuracy], found: list[Outcome], split: bool) -> None:
    from rich.table import Table

    from simulator.validation.split import CALIBRATION

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    console = wide_console()
    shown = Table("source", "rows are", "rows", "mean", "median", "max", "bias", "no forecast")
    for e in sources:
        errors = (e.mean_error, e.median_error, e.max_error, e.bias)
        shown.add_row(
            e.source, e.split, str(e.rows), *map(percent, errors), str(e.unpredicted or "")
        )
    console.print(shown)
    if split:
        rules = Table("calibrated on", "models", "constants")
        for rule in CALIBRATION:
            rules.add_row(rule.source, ", ".join(rule.models) or "all", rule.constants)
        console.print(rules)
    if found:
        lines = Table("row", "rows are", "measured", "predicted", "error", "assumed or missing")
        for x in found:
            predicted = "" if x.predicted is None else f"{x.predicted:.4g}"
            lines.add_row(
                x.id,
                x.split,
                f"{x.measured:g}",
                predicted,
                percent(x.error),
                x.remarks,
            )
        console.print(lines)
