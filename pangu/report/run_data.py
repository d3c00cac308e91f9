"""A run folder as a report sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from configs.compose import read_file
from configs.schema import Config
from pangu.report import ReportError
from pangu.report.run_files import (
    BASELINES,
    CONFIG,
    EXPERT_LOAD,
    METRICS,
    SAMPLE,
    ExpertLoad,
    Row,
    numbers,
    perplexity,
    read_metrics,
)

# Metrics that tell of what a step shares the machine with.
RATES = ("tokens_per_second_per_device", "model_tflops_per_device", "mfu")


T = TypeVar("T")


@dataclass(frozen=True)
class Losses:
    """Mean loss per token in nats of one model; None where it was not measured."""

    name: str
    training: float | None
    held_out: float | None

    def cells(self) -> list[str]:
        """Training loss, its perplexity, held-out loss, its perplexity, as a table shows them."""
        return [
            cell
            for loss in (self.training, self.held_out)
            for cell in (("–", "–") if loss is None else (f"{loss:.3f}", perplexity(loss)))
        ]


@dataclass(frozen=True)
class RunData:
    """What there is to show. `baselines` maps unigram and bigram to their losses."""

    folder: Path
    config: Config
    steps: list[Row]
    validation: list[Row]
    load: ExpertLoad | None
    baselines: dict[str, Losses]
    sample: str

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def recent(self, key: str) -> float | None:
        """Mean of a metric over the last twentieth of the steps, at least 20; None without any.

        Rates are those of steps that have the machine to themselves, where there are any.
        """
        rows = (key in RATES and [row for row in self.steps if "beside" not in row]) or self.steps
        count = max(20, len(self.steps) // 20)
        values = [row[key] for row in rows[-count:] if row.get(key) is not None]
        return fmean(values) if values else None

    def losses(self) -> list[Losses]:
        """The model's recent training and last held-out loss, then the baselines'."""
        held_out = self.validation[-1]["validation_loss"] if self.validation else None
        model = Losses(self.config.model.name, self.recent("loss"), held_out)
        return [model, *(self.baselines[name] for name in ("bigram", "unigram") if self.baselines)]


def read_run(folder: Path) -> RunData:
    """Read a run folder, of a finished run or of one that is under way.

    Raises:
        ReportError: there is no run, it has not taken a step yet, or a file of it is damaged.
        ConfigError: its configuration is not one of this version.
    """
    if not (folder / CONFIG).is_file():
        raise ReportError(f"{folder} is no run folder: it has no {CONFIG}")
    rows = [numbers(row) for row in _whole(read_metrics, folder / METRICS)]
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise ReportError(f"{folder} has no step in {METRICS} yet: there is nothing to report")
    sample = folder / SAMPLE
    return RunData(
        folder,
        read_file(folder / CONFIG, "config"),
        steps,
        [row for row in rows if row.get("validation_loss") is not None],
        _whole(ExpertLoad.read, folder / EXPERT_LOAD),
        _whole(read_baselines, folder / BASELINES),
        sample.read_text(encoding="utf-8", errors="replace") if sample.is_file() else "",
    )


def _whole(read: Callable[[Path], T], path: Path) -> T:
    """A file of the run folder.

    Raises:
        ReportError: it is not what a run writes there.
    """
    try:
        return read(path)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReportError(f"{path} is damaged ({error}): move it away") from None


def read_baselines(path: Path) -> dict[str, Losses]:
    """Losses of the unigram and the bigram model; {} where they were not computed."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text())
    found = {name: Losses(name, **values) for name, values in data.items()}
    for losses in found.values():
        losses.cells()  # raises what is wrong with them
    return found
