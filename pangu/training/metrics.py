"""Numbers of a run: one JSON object per line in `<run_dir>/metrics.jsonl`, and TensorBoard."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from configs.schema import Config
from pangu import backends
from pangu.engines.contract import StepResult
from pangu.moe.load import RoutingLoad, device_imbalance, dropped_tokens, expert_imbalance
from pangu.report.run_files import METRICS, read_metrics, replace_text, short
from simulator.api import count_parameters, model_flops_per_token

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, Any]


def step_row(
    config: Config,
    result: StepResult,
    load: RoutingLoad | None,
    *,
    step: int,
    learning_rate: float,
    seconds: float,
    sequences: int,
    seq_length: int,
) -> Row:
    """Describe one step. A collective over the world (the peak memory is the fullest rank's).

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
        "memory_gib": _largest(backends.current().memory_bytes() / 2**30),
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


def _largest(value: float) -> float:
    tensor = torch.tensor([value], dtype=torch.float32, device=backends.current().device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


class MetricsFile:
    """Appends to `metrics.jsonl` and TensorBoard; only rank 0 has files.

    A full disk costs no row while the run lives: what cannot be written is kept and written with
    the next row.
    """

    def __init__(self, run_dir: Path, active: bool) -> None:
        self.path = run_dir / METRICS
        self.active = active
        self._unwritten = b""
        self._last_step = 0
        self._board: SummaryWriter | None = None
        self._board_works = True
        if active:
            run_dir.mkdir(parents=True, exist_ok=True)

    def continue_after(self, step: int) -> None:
        """Forget rows of later steps: the run goes on (or starts again) after `step`."""
        self._last_step = step
        if not self.active:
            return
        self.close()
        self._unwritten = b""
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        replace_text(self.path, "".join(map(_line, kept)))

    def write(self, row: Row) -> None:
        """Append one row; it is in the file when the call returns."""
        if not self.active:
            return
        was_full = bool(self._unwritten)
        self._unwritten += _line(row).encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                self._unwritten = self._unwritten[file.write(self._unwritten) :]
        except OSError as error:
            if not was_full:
                print(f"warning: metrics wait to be written: {error}", file=sys.stderr)
        self._write_board(row)

    def close(self) -> None:
        """Finish the TensorBoard file."""
        if self._board is not None:
            try:
                self._board.close()
            except OSError:
                self._board_works = False
            self._board = None

    def _write_board(self, row: Row) -> None:
        if not self._board_works:
            return
        try:
            if self._board is None:
                self._board = self._open_board()
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, row["step"])
        except OSError as error:
            print(f"warning: no TensorBoard from here on: {error}", file=sys.stderr)
            self._board_works, self._board = False, None

    def _open_board(self) -> SummaryWriter:
        # Imported with the first row: it takes half a second that the first step need not wait.
        from torch.utils.tensorboard import SummaryWriter

        folder = str(self.path.parent / "tensorboard")
        return SummaryWriter(folder, purge_step=self._last_step + 1)


def _line(row: Row) -> str:
    """JSON has no NaN: what is not a number (a skipped step's loss) becomes null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
