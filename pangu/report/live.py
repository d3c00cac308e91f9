"""The report page of a run that goes on, over HTTP on this machine."""

from __future__ import annotations

from html import escape
from pathlib import Path

from configs.violation import ConfigError
from pangu.report import ReportError
from pangu.report.page import page
from pangu.report.run_data import read_run
from pangu.report.run_files import BASELINES, CONFIG, EXPERT_LOAD, METRICS, SAMPLE
from simulator.api import serve_page

REFRESH = 3  # seconds
_FILES = (METRICS, EXPERT_LOAD, BASELINES, SAMPLE)
_WAIT = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="{}"><p>{}</p>'


def serve(folder: Path, port: int) -> None:
    """The page of a run folder at /, read anew for everybody who asks, until Ctrl-C.

    Raises:
        ReportError: it is no run folder.
        ConfigError: the port cannot be listened on.
    """
    if not (folder / CONFIG).is_file():
        read_run(folder)  # says why

    def get(path: str) -> tuple[str, str]:
        if path == "/news":
            return "text/plain", news(folder)
        try:
            return "text/html", page(read_run(folder), REFRESH)
        except (ReportError, ConfigError) as error:  # no step yet, for one
            return "text/html", _WAIT.format(REFRESH, escape(str(error)))

    serve_page(port, get)


def news(folder: Path) -> str:
    """Another text whenever a file that the page shows is another."""
    states = [path.stat() for name in _FILES if (path := folder / name).is_file()]
    return " ".join(f"{state.st_ino}:{state.st_size}:{state.st_mtime_ns}" for state in states)
