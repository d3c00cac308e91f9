"""Every call of a torch-npu operator against that operator's real schema, without an NPU.

torch-npu cannot share an environment with a plain torch on a machine without CANN (importing torch
then fails), so it is looked for in a folder of its own, where `make test` puts it:

    pip install --no-deps --target .torch-npu torch-npu==2.13.0

Stand-in libraries take the place of CANN's (`tests/npu`), and operators are given reference
implementations for CPU tensors, so that the real NPU code path runs numerically.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from npu.standins import build, environment, missing


@pytest.mark.skipif(
    missing() and "CI" not in os.environ,  # a check that CI leaves out is none
    reason="needs torch-npu in .torch-npu (see the module's docstring), cc, g++ and nm",
)
def test_calls_fit_the_operators(tmp_path):
    build(tmp_path)
    script = Path(__file__).with_name("npu_calls.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-4:] == ["grouped_matmul", "permute", "swiglu", "rms_norm"]
