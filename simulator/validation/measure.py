"""Every row of a table beside its forecast, in the unit that was measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from configs.violation import ConfigError
from simulator.parameters import model_flops_per_token
from simulator.predict import Forecast, predict
from simulator.validation.engine import Case, NotPredictable, case
from simulator.validation.rows import Outcome
from simulator.validation.split import split_of
from simulator.validation.table import PACKAGED, Row, read_table
from simulator.validation.version import counts_half_the_square


def outcomes(
    path: Path = PACKAGED, progress: Callable[[list[Row]], Iterable[Row]] = iter
) -> list[Outcome]:
    """Predicts every row of a table.

    Raises:
        ConfigError: the table cannot be used.
    """
    packaged = path == PACKAGED
    return [outcome(row, packaged) for row in progress(read_table(path))]


def outcome(row: Row, packaged: bool) -> Outcome:
    """One row's forecast, or why there is none."""
    split = split_of(row["source"], row["model"]) if packaged else "judged"
    predicted, hardware, assumptions, reason, fits = None, "", "", "", True
    try:
        if row.measured is None:
            raise NotPredictable(f"the value '{row['value']}' is no single number")
        found = case(row)
        hardware = str((found.config.hardware or {}).get("name", ""))
        result = predict(found.config)
        predicted, fits = in_unit(found, result), result.fits
        assumptions = ", ".join(found.assumptions)
    except NotPredictable as error:
        reason = str(error)
    except ConfigError as error:
        reason = "; ".join(str(error).splitlines())
    return Outcome(
        id=row["id"],
        source=row["source"],
        metric=row["measured_metric"],
        measured=row.measured or 0.0,
        predicted=predicted,
        split=split,
        hardware=hardware,
        kind="moe" if row.number("n_experts") else "dense",
        assumptions=assumptions,
        reason=reason,
        fits=fits,
    )


def in_unit(found: Case, result: Forecast) -> float:
    """A forecast in its row's unit.

    Model FLOPs are counted as the row's engine counts them.

    Raises:
        NotPredictable: the metric is none of a training step.
    """
    row, config = found.row, found.config
    metric = row["measured_metric"]
    rate = result.tokens_per_second_per_device
    if metric.startswith("step_time_ms"):
        return 1e3 * result.step_seconds
    if metric.startswith("step_time_s"):
        return result.step_seconds
    if metric.startswith("tokens_per_s_total"):
        return result.tokens_per_second
    if metric.startswith("tokens_per_s"):
        return rate * (2 if row.mentions("two-die package") else 1)
    if metric.startswith("peak_allocated_GiB"):
        return result.peak_memory_gib
    if metric.startswith("GPU_hours_per_1T"):
        return 1e12 / rate / 3600
    half = config.model.attention == "mla" or counts_half_the_square(row)
    flops = model_flops_per_token(config, causal=half)
    if metric.startswith("MFU_pct"):
        stated = re.search(r"peak ([\d.]+) TFLOPS", row["notes"])
        peak = float(stated.group(1)) if stated else result.peak_tflops
        return 100 * rate * flops / (peak * 1e12)
    if metric.startswith("achieved_TFLOPS"):
        return rate * _hardware_flops(found) / 1e12
    if metric.startswith(("model_TFLOPS", "TFLOPS_per")):
        return rate * flops / 1e12
    raise NotPredictable(f"the metric '{metric}' is not forecast")


def _hardware_flops(found: Case) -> float:
    """Per token, with full recomputation: 96·l·h²·(1 + s/6h + V/16lh) (arXiv 2104.04473)."""
    model = found.config.model
    layers, hidden = model.num_layers, model.hidden_size
    ends = model.vocab_size / (16 * layers * hidden)
    square = found.config.train.seq_length / (6 * hidden)
    return 96 * layers * hidden**2 * (1 + square + ends)
