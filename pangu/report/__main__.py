"""Plots and page of a run, at any time; with --serve, a page that follows it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pangu.command_line import run as run_app

app = typer.Typer(add_completion=False, help=__doc__)


@app.command(help=__doc__)
def report(
    run_dir: Annotated[Path, typer.Argument(help="a run folder")],
    serve: Annotated[
        bool, typer.Option("--serve", help="serve the page here, drawn anew while the run goes on")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0: any free.")] = 8766,
) -> None:
    from pangu.report import ReportError
    from pangu.report.run_data import read_run

    if serve:
        from pangu.report import live

        live.serve(run_dir, port)
        return
    run = read_run(run_dir)
    from pangu.report.page import write_page
    from pangu.report.plots import write_plots

    try:
        for path in [*write_plots(run), write_page(run)]:
            print(path)
    except OSError as error:
        raise ReportError(f"the report cannot be written: {error}") from None


def main(arguments: list[str]) -> int:
    """The exit code: 0 done, 2 nothing to report on."""
    from configs.violation import ConfigError
    from pangu.report import ReportError

    return run_app(app, arguments, ReportError, ConfigError)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
