"""A plot as a file."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.violation import ConfigError, Violation

FORMATS = (".png", ".svg", ".pdf")


def must_be_drawable(path: Path | None) -> None:
    """Raises:
    ConfigError: of another format, or nobody here could draw it.
    """
    if path is None:
        return
    if path.suffix not in FORMATS:
        raise ConfigError([Violation("--plot", path, f"ends with one of {', '.join(FORMATS)}")])
    if importlib.util.find_spec("matplotlib") is None:
        reason = "plots are drawn by matplotlib, which is not installed"
        raise ConfigError([Violation("--plot", path, reason, "pip install matplotlib")])


@contextlib.contextmanager
def plotted(path: Path, **figure: Any) -> Iterator[tuple[Any, Any]]:
    """matplotlib's figure and axes, made with the keywords of `subplots`, that are written after
    the block; the format is that of the file's name.

    Raises:
        ConfigError: another format, or matplotlib is not here.
    """
    must_be_drawable(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(layout="constrained", **figure)
    try:
        yield made, axes
        made.savefig(path, dpi=150)
    finally:
        plt.close(made)
