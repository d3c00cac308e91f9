"""`loss.png` and `expert_load.png`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pangu.report.run_data import RunData
from pangu.report.run_files import ExpertLoad

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

TRAINING, HELD_OUT, BASELINE, INK, QUIET = "#2f6fb0", "#d9730d", "#7a7a7a", "#222222", "#dddddd"
DEAD = "#ffd21f"  # on the darkest blue
_MOST_TICKS = 24


def write_plots(run: RunData) -> list[Path]:
    """Draw what the run has numbers for; the files written."""
    figures = {"loss.png": loss_figure(run)}
    if run.load:
        figures["expert_load.png"] = load_figure(run.load, run.name)
    for name, figure in figures.items():
        figure.savefig(run.folder / name, dpi=150)
    return [run.folder / name for name in figures]


def loss_figure(run: RunData) -> Figure:
    """Training and held-out loss over the steps, beside what n-grams reach."""
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = _figure(9, 5)
    steps = np.array([row["step"] for row in run.steps])
    loss = np.array([row["loss"] for row in run.steps], dtype=float)  # None becomes NaN
    axes.plot(steps, loss, color=TRAINING, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smooth(loss), color=TRAINING, linewidth=1.8, label="training (smoothed)")
    if run.validation:
        axes.plot(
            [row["step"] for row in run.validation],
            [row["validation_loss"] for row in run.validation],
            color=HELD_OUT,
            marker="o",
            markersize=4,
            linewidth=1.8,
            clip_on=False,
            label="held-out",
        )
    for name, style in (("unigram", ":"), ("bigram", "--")):
        level = run.baselines[name].held_out if name in run.baselines else None
        if level is not None:
            label = f"{name}, held-out ({level:.2f})"
            axes.axhline(level, color=BASELINE, linestyle=style, linewidth=1.3, label=label)
    axes.set_xlim(0 if steps[0] == 1 else steps[0], max(steps[-1], steps[0] + 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 0.5
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{run.name}: loss", loc="left", fontweight="bold")
    axes.grid(color=QUIET, linewidth=0.6)
    axes.legend(frameon=False)
    return figure


def load_figure(load: ExpertLoad, name: str) -> Figure:
    """Choices of every expert over those of an even spread, layers × experts; below it, where a
    bias balances, every expert's."""
    from matplotlib.colors import TwoSlopeNorm

    values = load.relative()
    layers, experts = values.shape
    cell, maps = min(0.42, 13 / experts), 2 if load.biases else 1
    height = max(2.4, layers * min(cell, 0.3) + 1.6)
    figure, places = _figure(max(6.5, experts * cell + 2.2), maps * height, rows=maps)
    axes, top = places[0], max(2.0, float(values.max()))
    steps = f"steps {load.first_step}–{load.last_step}"
    image = _heat(axes, load, values, TwoSlopeNorm(1.0, 0.0, top), f"{name}: expert load, {steps}")
    dead = np.argwhere(values == 0)
    axes.plot(dead[:, 1], dead[:, 0], "x", color=DEAD, markersize=4, linestyle="none")
    _scale(figure, axes, image, "× even share", _load_ticks(top))
    if load.biases:
        biases = np.array(list(load.biases.values()))
        reach = max(float(np.abs(biases).max()), 1e-6)
        title = f"balancing bias after step {load.last_step}"
        image = _heat(places[1], load, biases, TwoSlopeNorm(0.0, -reach, reach), title)
        _scale(figure, places[1], image, "added to the score", [-reach, 0.0, reach])
    return figure


def _heat(axes: Axes, load: ExpertLoad, values: np.ndarray, norm: Any, title: str) -> AxesImage:
    """Layers × experts as colours, with the groups' boundaries."""
    image = axes.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto", origin="upper")
    experts = values.shape[1]
    size = experts // load.num_groups
    for boundary in range(size, experts, size) if load.num_groups > 1 else ():
        axes.axvline(boundary - 0.5, color=INK, linewidth=1.2)
    _number(axes.xaxis, list(range(experts)))
    _number(axes.yaxis, list(load.counts))
    axes.set_xlabel("expert" + (" (lines: group boundaries)" if load.num_groups > 1 else ""))
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    axes.set_title(title, loc="left", fontweight="bold")
    return image


def _scale(figure: Figure, axes: Axes, image: AxesImage, label: str, ticks: list[float]) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=ticks)
    bar.set_label(label)
    bar.outline.set_visible(False)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over 2 % of the steps on either side, fewer at the ends; skipped steps (NaN) count for
    nothing."""
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    places, reach = np.arange(len(values)), len(values) // 50
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    counted = count[last] - count[first]
    return np.where(counted > 0, (total[last] - total[first]) / np.maximum(counted, 1), np.nan)


def _load_ticks(top: float) -> list[float]:
    return [0, 0.5, 1, *np.linspace(1, top, 4)[1:].round(1).tolist()]


def _number(axis: Any, names: list[int]) -> None:
    stride = -(-len(names) // _MOST_TICKS)
    axis.set_ticks(range(0, len(names), stride), [str(name) for name in names[::stride]])


def _figure(width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    # Imported when there is something to draw; no pyplot, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    places: list[Axes] = figure.subplots(rows, squeeze=False).flatten().tolist()
    for axes in places:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, places
