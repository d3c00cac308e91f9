"""The accuracy table of docs/simulator-accuracy.md, its scatter plot, and the error bars that
forecasts carry."""

from __future__ import annotations

import json
from pathlib import Path

from simulator.hardware import presets, read_hardware
from simulator.validation.rows import Accuracy, Outcome, accuracy, by_machine, summarise
from simulator.validation.split import CALIBRATION

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "simulator-accuracy.md"
PLOT = ROOT / "docs" / "simulator-accuracy.png"
ERROR_BARS = ROOT / "simulator" / "accuracy.json"


def publish(training: list[Outcome], serving: list[Outcome]) -> None:
    """Writes the page, its plot and the error bars."""
    PAGE.write_text(page(training, serving), encoding="utf-8")
    scatter(training + serving, PLOT)
    ERROR_BARS.write_text(json.dumps(by_machine(training), indent=1) + "\n", encoding="utf-8")


def page(training: list[Outcome], serving: list[Outcome]) -> str:
    """Markdown: what was calibrated on what, accuracy by source, every row."""
    judged = [x for x in training if x.split == "judged" and not x.is_memory]
    whole = accuracy("all judged rows of time", judged)
    rules = [
        f"| {rule.source} | {', '.join(rule.models) or 'all'} | {rule.constants} |"
        for rule in CALIBRATION
    ]
    parts = [
        "# How accurate the simulator is",
        "Written by `python -m simulator validate --publish`. The rows are published measurements"
        " (`simulator/validation/measured.csv`, `serving.csv`); none was measured by this project."
        " Error is (predicted - measured)/measured in the row's own unit, the mean is of absolute"
        " errors, bias is the signed mean.",
        f"Rows that no constant was fitted to: {whole.rows} of time, mean error"
        f" {_percent(whole.mean_error)}, median {_percent(whole.median_error)}, bias"
        f" {_percent(whole.bias, sign=True)}.",
        "![predicted against measured](simulator-accuracy.png)",
        "## What was calibrated on what",
        "The presets' general constants (`configs/hardware`, grade C) were set on these rows,"
        " chosen by source and model family. Everything else is judged.",
        "| source | models | constants |\n|---|---|---|\n" + "\n".join(rules),
        "## By source",
        _table(summarise(training + serving, by_split=True)),
        "## What rows leave open",
        "A row rarely gives everything. Missing sizes are filled in by the rules of"
        " `simulator/validation/engine.py`: micro-batch 1, the least recomputation that fits, the"
        " engine's usual interleaving; what Megatron-Bridge's published recipes say is in"
        " `simulator/validation/recipes.py`. The last column below says what a row's forecast"
        " assumes.",
        "## Every row",
        _rows(training + serving),
        "## Evidence behind the machines",
        _evidence(),
    ]
    return "\n\n".join(parts) + "\n"


def _table(entries: list[Accuracy]) -> str:
    lines = ["| source | rows are | rows | mean | median | max | bias | not predicted |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    lines += [
        f"| {e.source} | {e.split} | {e.rows} | {_percent(e.mean_error)} |"
        f" {_percent(e.median_error)} | {_percent(e.max_error)} | {_percent(e.bias, sign=True)} |"
        f" {e.unpredicted or ''} |"
        for e in entries
    ]
    return "\n".join(lines)


def _rows(outcomes: list[Outcome]) -> str:
    lines = ["| row | rows are | machine | unit | measured | predicted | error | assumed |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for x in outcomes:
        predicted = "-" if x.predicted is None else f"{x.predicted:.4g}"
        metric = x.metric.split(" (")[0]
        lines.append(
            f"| {x.id} | {x.split} | {x.hardware} | {metric} | {x.measured:g} | {predicted} |"
            f" {_percent(x.error, sign=True)} | {x.remarks} |"
        )
    return "\n".join(lines)


def _evidence() -> str:
    lines = ["| preset | figure | grade and source |", "|---|---|---|"]
    for name in presets():
        for figure, grade in read_hardware(name).evidence.items():
            lines.append(f"| {name} | {figure} | {grade} |")
    return "\n".join(lines)


def _percent(value: float | None, sign: bool = False) -> str:
    return "-" if value is None else f"{value:+.1%}" if sign else f"{value:.1%}"


def scatter(outcomes: list[Outcome], path: Path) -> None:
    """Predicted over measured against measured, one colour per machine, judged rows filled."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    shown = [x for x in outcomes if x.predicted is not None]
    for index, machine in enumerate(sorted({x.hardware for x in shown})):
        for split, fill in (("calibrated", False), ("judged", True)):
            points = [x for x in shown if x.hardware == machine and x.split == split]
            if points:
                colour = f"C{index % 10}"
                axes.scatter(
                    [x.measured for x in points],
                    [1.0 + (x.error or 0.0) for x in points],
                    s=16,
                    edgecolors=colour,
                    facecolors=colour if fill else "none",
                    label=f"{machine or 'serving'}, {split}",
                )
    axes.axhline(1.0, color="black", linewidth=1)
    axes.axhspan(0.9, 1.1, color="grey", alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel="measured, in the row's unit")
    axes.set_ylabel("predicted / measured")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
