"""A plot as a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.violation import ConfigError, Violation

FORMATS = (".png", ".svg", ".pdf")


@contextlib.contextmanager
def plotted(path: Path, **figure: Any) -> Iterator[tuple[Any, Any]]:
    """matplotlib's figure and axes, made with the keywords of `subplots`, that are written after
    the block; the format is that of the file's name.

    Raises:
        ConfigError: another format.
    """
    if path.suffix not in FORMATS:
        raise ConfigError([Violation("--plot", path, f"ends with one of {', '.join(FORMATS)}")])
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(layout="constrained", **figure)
    try:
        yield made, axes
        made.savefig(path, dpi=150)
    finally:
        plt.close(made)
