"""Plots and page of a run: `python -m pangu.report RUN_DIR`, at any time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from configs.violation import ConfigError
from pangu.report.run_data import ReportError, read_run


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 written, 2 nothing to report on."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m pangu.report RUN_DIR", file=sys.stderr)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    try:
        run = read_run(Path(arguments[0]))
    except (ReportError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    from pangu.report.page import write_page
    from pangu.report.plots import write_plots

    try:
        for path in [*write_plots(run), write_page(run)]:
            print(path)
    except OSError as error:
        print(f"the report cannot be written: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
