"""Numbers of a run: one JSON object per line in `<run_dir>/metrics.jsonl`, and TensorBoard."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist

from configs.schema import Config
from pangu import backends
from pangu.engines.contract import StepResult
from pangu.moe.load import RoutingLoad, device_imbalance, dropped_tokens, expert_imbalance
from pangu.plain_file import read_plain
from pangu.report.run_files import METRICS, parse_rows, replace_text, short
from pangu.training.growing_file import GrowingFile
from simulator.api import count_parameters, model_flops_per_token

if TYPE_CHECKING:
    from pangu.training.tensorboard import Board

Row = dict[str, Any]


class Watcher(Protocol):
    """Who is told every row of a run beside its files."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


def step_row(
    config: Config,
    result: StepResult,
    load: RoutingLoad | None,
    *,
    step: int,
    learning_rate: float,
    seconds: float,
    memory_gib: float,
    sequences: int,
    seq_length: int,
) -> Row:
    """Describe one step; `memory_gib` is the fullest rank's peak.

    `tokens` counts those whose loss is trained on; FLOPs and routing see all of the batch. `mfu`
    is the fraction of the peak that the *active* parameters' FLOPs reach, recomputation not
    counted, and is absent where no peak is known. A dense model's routing fields are None.
    """
    devices = dist.get_world_size()
    processed = sequences * seq_length
    flops = model_flops_per_token(config, seq_length=seq_length) * processed
    tflops = flops / seconds / devices / 1e12
    peak = peak_tflops(config)
    row = {
        "step": step,
        "loss": result.loss,
        "aux_loss": load.aux_loss if load else None,
        "z_loss": load.z_loss if load else None,
        **({} if result.mtp_loss is None else {"mtp_loss": result.mtp_loss}),
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate,
        "tokens": result.tokens,
        "step_seconds": seconds,
        "tokens_per_second_per_device": result.tokens / seconds / devices,
        "model_tflops_per_device": tflops,
        **({"mfu": tflops / peak} if peak else {}),
        "memory_gib": memory_gib,
    }
    return row | _routing(config, load, processed)


def _routing(config: Config, load: RoutingLoad | None, tokens: int) -> Row:
    if load is None:
        return dict.fromkeys(("device_imbalance", "expert_imbalance", "dropped_tokens"))
    top_k = config.moe.top_k
    ranks = config.parallel.expert_model_parallel_size
    return {
        "device_imbalance": device_imbalance(load.counts, ranks, top_k),
        "expert_imbalance": expert_imbalance(load.counts, top_k),
        "dropped_tokens": dropped_tokens(load.counts, tokens, top_k),
    }


def precision(config: Config) -> str:
    """The precision that `auto` stands for on this backend, or the configured one."""
    configured = config.backend.precision
    return backends.current().default_precision if configured == "auto" else configured


def peak_tflops(config: Config) -> float | None:
    """Dense peak per device behind MFU: configured, or the device's own; None where unknown."""
    return config.backend.peak_tflops or backends.current().peak_tflops(precision(config))


def describe_run(config: Config) -> str:
    """One line for the start of a run: the model, where it runs, and the peak behind MFU."""
    count, backend = count_parameters(config), backends.current()
    line = (
        f"{config.model.name}: {short(count.total)} parameters, {short(count.active)} active per "
        f"token, on {dist.get_world_size()} × {backend.description}, {precision(config)}"
    )
    if peak := peak_tflops(config):
        return f"{line}; MFU counts active parameters, against {peak:g} TFLOPS per device"
    return line


class MetricsFile:
    """Appends to `metrics.jsonl` and TensorBoard, and tells `watchers`; only rank 0 has files.

    A full disk costs no row while the run lives: see `GrowingFile`.
    """

    def __init__(self, run_dir: Path, active: bool, watchers: Sequence[Watcher] = ()) -> None:
        self.path = run_dir / METRICS
        self.active = active
        self._file = GrowingFile(self.path, "metrics")
        self._last_step = 0
        self._watchers = watchers
        self._board: Board | None = None
        if active:
            run_dir.mkdir(parents=True, exist_ok=True)

    def continue_after(self, step: int) -> None:
        """Forget rows of later steps: the run goes on (or starts again) after `step`.

        Raises:
            OSError: the file cannot be read, or written anew.
        """
        self._last_step = step
        if not self.active:
            return
        self._board = None
        written = read_plain(self.path) if self.path.exists() else b""
        written += self._file.waiting
        rows = parse_rows(written)
        # But for the last one, which a killed run may have left unfinished.
        if lost := sum(map(bool, written.split(b"\n")[:-1])) - len(rows):
            print(
                f"warning: {self.path}: {lost} lines are no rows of a run and are left out",
                file=sys.stderr,
            )
        kept = [row for row in rows if row["step"] <= step]
        replace_text(self.path, "".join(map(_line, kept)))
        self._file = GrowingFile(self.path, "metrics")

    def write(self, row: Row) -> None:
        """Append one row; it is in the file when the call returns."""
        if not self.active:
            return
        self._file.append(_line(row).encode())
        for watcher in self._watchers:
            watcher.write(row)
        if self._board is None:
            # Imported with the first row: the first step need not wait for it.
            from pangu.training.tensorboard import Board

            self._board = Board(self.path.parent / "tensorboard", self._last_step + 1)
        self._board.write(row)

    def close(self) -> None:
        """What the disk had no room for until now has its last chance."""
        self._file.append(b"")
        if self._board is not None:
            self._board.close()
        for watcher in self._watchers:
            watcher.close()


def _line(row: Row) -> str:
    """JSON has no NaN: what is not a number (a skipped step's loss) becomes null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
