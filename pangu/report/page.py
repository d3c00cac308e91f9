"""`report.html`: one file, with its numbers, that opens anywhere."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import Config
from pangu.report.plots import smooth
from pangu.report.run_data import RATES, RunData
from pangu.report.run_files import Row, perplexity, short
from simulator.api import count_parameters, fill_page

TEMPLATE = Path(__file__).with_name("page.html")
_MOST_POINTS = 1500  # per curve: more than a screen has pixels
_CURVES = {
    "tokens_per_second_per_device": "Tokens per second and device",
    "grad_norm": "Gradient norm before clipping",
    "learning_rate": "Learning rate",
    "device_imbalance": "Device imbalance (IS), pairs per token",
    "expert_imbalance": "Expert imbalance, pairs per token",
    "device_load_cv": "Device load, standard deviation over mean",
    "experts_moved": "Experts moved between ranks after the step",
    "aux_loss": "Auxiliary loss (1 = balance)",
    "mfu": "Model FLOPs utilisation",
    "memory_gib": "Peak memory of the fullest rank (GiB)",
}


def write_page(run: RunData) -> Path:
    """Write `<run_dir>/report.html`."""
    path = run.folder / "report.html"
    path.write_text(page(run), encoding="utf-8")
    return path


def page(run: RunData, refresh: int = 0) -> str:
    """The page's text. Where it is served, it looks every `refresh` seconds for news at `/news`."""
    return fill_page(TEMPLATE, _data(run) | {"refresh": refresh})


def _data(run: RunData) -> dict[str, Any]:
    every = -(-len(run.steps) // _MOST_POINTS)
    rows = run.steps[::every]
    if rows[-1] is not run.steps[-1]:
        rows = [*rows, run.steps[-1]]
    loss = [math.nan if row["loss"] is None else row["loss"] for row in run.steps]
    smoothed = smooth(np.array(loss))
    smoothed_at = {row["step"]: value for row, value in zip(run.steps, smoothed, strict=True)}
    curves = {
        key: _curve(key, title, run, rows)
        for key, title in _CURVES.items()
        if any(row.get(key) is not None for row in rows) and _says_something(key, run.config)
    }
    return {
        "name": run.name,
        "subtitle": _subtitle(run),
        "tiles": _tiles(run),
        "table": [[one.name, *one.cells()] for one in run.losses()],
        "steps": [row["step"] for row in rows],
        "loss": [row["loss"] for row in rows],
        "smoothed": [_finite(smoothed_at[row["step"]]) for row in rows],
        "validation": [[row["step"], row["validation_loss"]] for row in run.validation],
        "baselines": {name: one.held_out for name, one in run.baselines.items()},
        "curves": curves,
        "load": _load(run),
        "sample": run.sample,
        "config": {key: value for key, value in asdict(run.config).items() if key != "hardware"},
    }


def _says_something(key: str, config: Config) -> bool:
    """Whether a curve can be anything but flat: one device is always balanced, and a loss without
    a coefficient is never computed."""
    if key == "aux_loss":
        return config.moe.aux_loss_coefficient > 0
    return key != "device_imbalance" or config.parallel.expert_model_parallel_size > 1


def _curve(key: str, title: str, run: RunData, rows: list[Row]) -> dict[str, Any]:
    """One metric: [step, value] of `rows`, and a line about it."""
    alone = [row for row in rows if "beside" not in row] if key in RATES else rows
    left_out = len(rows) - len(alone)
    points = [[row["step"], row.get(key)] for row in (alone or rows)]
    return {"title": title, "points": points, "note": _note(key, run.config, left_out and alone)}


def _note(key: str, config: Config, left_out: object) -> str:
    if key in RATES:
        steps = "steps beside the writing of a checkpoint or just after a validation"
        return f"Without {steps}, which are slower for that." if left_out else ""
    spread = "(most − least token–expert pairs of one {}) / tokens: 0 is even, {} the most"
    if key == "device_imbalance":
        return spread.format("device", most_device_imbalance(config))
    return spread.format("expert", 1) if key == "expert_imbalance" else ""


def most_device_imbalance(config: Config) -> int:
    """The largest IS there can be: the choices of one token that may fall on one device."""
    held = config.model.num_experts // config.parallel.expert_model_parallel_size
    return min(config.moe.top_k, held)


def _finite(value: float) -> float | None:
    return round(float(value), 5) if math.isfinite(value) else None


def _subtitle(run: RunData) -> str:
    count, config = count_parameters(run.config), run.config
    parts = [
        f"{config.model.name}: {short(count.total)} parameters, {short(count.active)} active",
        f"{run.steps[-1]['step']:,} of {config.train.steps:,} steps",
    ]
    if config.model.num_experts:
        moe = config.moe
        routing = f"{moe.router}, {moe.top_k} of {config.model.num_experts} experts"
        grouped = moe.router in ("moge", "group_limited") and moe.num_expert_groups > 1
        groups = f" in {moe.num_expert_groups} groups" if grouped else ""
        parts.append(routing + groups)
    return " · ".join(parts)


def _tiles(run: RunData) -> list[list[str]]:
    """[value, what it is] of the figures that people look for first."""
    tiles = []
    model, *baselines = run.losses()
    if model.held_out is not None:
        note = f"held-out loss, perplexity {perplexity(model.held_out)}"
        tiles.append([f"{model.held_out:.3f}", note])
        if baselines and baselines[0].held_out is not None:
            gain = baselines[0].held_out - model.held_out
            verb = "below" if gain >= 0 else "above"
            tiles.append([f"{abs(gain):.2f}", f"nats {verb} a bigram model"])
    for key, form, note in (
        ("tokens_per_second_per_device", "{:,.0f}", "tokens/s per device"),
        ("mfu", "{:.1%}", "MFU, active parameters"),
        (
            "device_imbalance",
            "{:.3g}",
            f"device imbalance, 0 to {most_device_imbalance(run.config)}",
        ),
        ("expert_imbalance", "{:.3g}", "expert imbalance, 0 to 1"),
    ):
        value = run.recent(key)
        if value is not None and _says_something(key, run.config):
            tiles.append([form.format(value), note])
    tiles.append([short(sum(row.get("tokens") or 0 for row in run.steps)), "tokens trained"])
    return tiles


def _load(run: RunData) -> dict[str, Any] | None:
    if run.load is None:
        return None
    return {
        "layers": list(run.load.counts),
        "values": [[round(x, 3) for x in row] for row in run.load.relative().tolist()],
        "groups": run.load.num_groups,
        "steps": [run.load.first_step, run.load.last_step],
        "biases": [[round(x, 6) for x in row] for row in run.load.biases.values()],
    }
