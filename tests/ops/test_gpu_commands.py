"""What is to be run on a GPU, where there is none."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from pangu.backends import cuda

ROOT = Path(__file__).parents[2]


def run(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["benchmarks/gpu.py"], "error: benchmarks/gpu.py needs an NVIDIA GPU, torch sees none"),
        (
            ["-m", "pangu.doctor", "backend=cuda", "--device-check"],  # make test-gpu
            "error: backend=cuda: local rank 0 needs a GPU, torch sees 0",
        ),
    ],
)
def test_without_a_gpu_they_say_so_in_a_sentence(words, said):
    done = run(*words)
    assert (done.returncode, done.stderr.strip(), done.stdout) == (2, said, "")


def test_the_benchmark_rehearses_on_a_cpu(tmp_path):
    done = run("benchmarks/gpu.py", "--rehearse", "--output", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(check["holds"] for check in found["checks"])
    kernels = {row["operator"] for row in found["operators"]}
    fused = {name for name, kind in asdict(cuda.OURS).items() if kind in ("triton", "chunks")}
    assert kernels == fused
    assert [row["operators"] for row in found["steps"]] == ["kernels", "plain"]
    (layer,) = found["layers"]
    assert {"moge, balanced", "top_k, one-hot, plain"} <= layer.keys()
