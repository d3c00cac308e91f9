"""The quick start through torch-npu's real device, process group and operators, without an NPU.

    python -m tests.npu                      # two processes, beside one on the CPU without layout
    python -m tests.npu moe=top_k train.steps=4
    python -m tests.npu launch.processes=4 parallel.expert_model_parallel_size=2 \\
        parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true

CANN's libraries are stood in for: its runtime by the host's memory (`acl.c`), HCCL by a shared file
(`hccl.cpp`), every kernel by its CPU kernel or reference (`host_memory.py`, `operators.py`). What
is real is what lies above: device names, the allocator, streams and events as torch-npu asks for
them, pinned memory, schemas, dispatch, autograd and the types that HCCL's group takes. Copies on
a stream beside the main one (`late_copies.py`) and messages (`late.cpp`) are late, and freed memory
is overwritten. What it cannot show: kernels, their precision and limits, speed.

Needs cc, g++, nm and torch-npu in .torch-npu (`make .torch-npu/.installed`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.npu.standins import ROOT, build, environment, missing

COMPARED = ("loss", "grad_norm", "aux_loss")


def run(folder: Path, words: list[str], environment: dict[str, str], launcher: list[str]) -> list:
    """Rows of metrics of a run."""
    common = ["experiment=quickstart", "train.steps=2", "train.validate_every=0"]
    common += ["checkpoint.save_every=0", "backend.precision=fp32", f"run_dir={folder}"]
    command = [sys.executable, *launcher, *common, *words]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def main(words: list[str]) -> int:
    """0: equal to 1e-5; 1: not; 2: something is missing."""
    if absent := missing():
        print(f"error: needs {', '.join(absent)} (make .torch-npu/.installed)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as work:
        libraries = Path(work) / "lib"
        libraries.mkdir()
        build(libraries)
        plain = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        npu = environment(libraries)
        alone = ["-m", "pangu.train", "launch.processes=1", "backend=cpu"]
        processes, layout, shared = "2", [], []
        for word in words:
            if word.startswith("launch.processes="):
                processes = word.partition("=")[2]
            else:  # one process has no layout
                (layout if word.startswith("parallel.") else shared).append(word)
        expected = run(Path(work) / "cpu", shared, plain, alone)
        ranks = ["-m", "torch.distributed.run", "--nproc-per-node", processes]
        ranks += ["-m", "tests.npu.worker", "backend=npu"]
        found = run(Path(work) / "npu", [*shared, *layout], npu, ranks)
    worst = 0.0
    print(f"{'step':6}{'':12}{'cpu':>16}{'npu path':>16}")
    for ours, theirs in zip(expected, found, strict=True):
        for key in COMPARED:
            print(f"{ours['step']:<6}{key:12}{ours[key]:16.9f}{theirs[key]:16.9f}")
            worst = max(worst, abs(ours[key] - theirs[key]) / abs(ours[key]))
    print(f"largest relative difference {worst:.1e}")
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
