"""`python -m pangu.doctor backend=… --device-check`: does a device compute what references do?

Every operator of `pangu/ops` as the backend runs it, forward and backward, against its reference on
the host; two steps of a small model, in float32 and bf16, against the same steps on the CPU; what
the device's memory and its host's link carry. Tables in Markdown, to be pasted into an issue.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.table import Table

from pangu import backends
from pangu.engines.megatron.fitting import select_backend
from pangu.machine_check import packages
from pangu.ops.cases import TOLERANCES, cases, compared
from pangu.violation_table import console

STACK = ("torch", "torch-npu", "triton", "megatron-core")
STEPS = ("loss", "grad_norm", "aux_loss")
STEP_TOLERANCES = {"fp32": 1e-3, "bf16": 1e-2}
COPIED_BYTES = 1 << 28


def software() -> list[str]:
    """Versions of what a device's results may depend on; of CANN, where its `set_env.sh` points."""
    found = [f"{name} {said}" for name in STACK if (said := packages()[name])]
    home = os.environ.get("ASCEND_TOOLKIT_HOME")
    return [*found, f"CANN in {Path(home).resolve()}"] if home else found


def steps(name: str, precision: str) -> list[tuple[int, str, float, float]]:
    """(step, what, on the CPU, on the device) of two steps of a small model, each in a process."""
    rows: list[list[dict[str, float]]] = []
    for backend in ("cpu", name):
        with tempfile.TemporaryDirectory() as folder:
            run = f"{folder}/run"
            words = [
                "experiment=quickstart",
                "data=synthetic",
                "train.steps=2",
                "train.micro_batch_size=4",
            ]
            words += ["launch.processes=1", "train.global_batch_size=4", "train.validate_every=0"]
            words += ["checkpoint.save_every=0", f"backend.precision={precision}", f"run_dir={run}"]
            command = [sys.executable, "-m", "pangu.train", *words, f"backend={backend}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-3:]))
            lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
            rows.append([json.loads(line) for line in lines])
    return [
        (int(ours["step"]), key, ours[key], theirs[key])
        for ours, theirs in zip(*rows, strict=True)
        for key in STEPS
    ]


def bandwidths() -> dict[str, float]:
    """GB/s of a copy of 256 MB, the best of five: within the device (read and written), and where
    it has memory of its own, from pinned memory of the host and back."""
    backend = backends.current()
    there = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=backend.device)
    copies = {"within the device": (torch.empty_like(there), there, 2)}
    if backend.asynchronous:
        here = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        copies["host to device"] = (there, here, 1)
        copies["device to host"] = (here, there, 1)
    found = {}
    for name, (target, source, passes) in copies.items():
        seconds = []
        for _ in range(5):
            backend.synchronize()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            backend.synchronize()
            seconds.append(time.perf_counter() - start)
        found[name] = passes * COPIED_BYTES / min(seconds) / 1e9
    return found


def main(name: str) -> int:
    """Print the tables. 2: this machine has not the backend, 1: something differs, else 0."""
    try:
        backend = select_backend(name, try_kernels=False)
    except RuntimeError as error:
        print(f"error: backend={name}: {error}", file=sys.stderr)
        return 2
    print(f"{', '.join((backend.description, *software()))}\n")
    outcomes = [compared(case, dtype) for case in cases() for dtype in TOLERANCES]
    table = _table("operator", "dtype", "largest error", "allowed", "")
    for each in outcomes:
        off, verdict = f"{each.error:.1e}", "ok" if each.holds else each.raised or "DIFFERS"
        dtype = str(each.dtype).removeprefix("torch.")
        table.add_row(each.name, dtype, off, f"{TOLERANCES[each.dtype]:.0e}", verdict)
    console().print(table)
    holds = all(each.holds for each in outcomes)
    for precision in STEP_TOLERANCES:
        try:
            holds &= _show_steps(precision, steps(backend.name, precision))
        except RuntimeError as error:
            print(f"error: two {precision} steps on {backend.name}: {error}", file=sys.stderr)
            holds = False
    table = _table("copy of 256 MB", "GB/s")
    for what, speed in bandwidths().items():
        table.add_row(what, f"{speed:.1f}")
    console().print(table)
    return 0 if holds else 1


def _show_steps(precision: str, rows: list[tuple[int, str, float, float]]) -> bool:
    table = _table(f"{precision} step", "", "cpu", "device", "")
    holds = True
    for step, what, ours, theirs in rows:
        fits = abs(ours - theirs) <= STEP_TOLERANCES[precision] * abs(ours)
        holds &= fits
        verdict = "ok" if fits else "DIFFERS"
        table.add_row(str(step), what, f"{ours:.7f}", f"{theirs:.7f}", verdict)
    console().print(table)
    return holds


def _table(*headings: str) -> Table:
    table = Table(box=MARKDOWN)
    for heading in headings:
        table.add_column(heading)
    return table
