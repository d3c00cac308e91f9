"""Every call of a torch-npu operator against that operator's real schema, without an NPU.

torch-npu cannot share an environment with a plain torch on a machine without CANN (importing torch
then fails), so it is looked for in a folder of its own, where `make test` puts it:

    pip install --no-deps --target .torch-npu torch-npu==2.13.0

Stand-in libraries take the place of CANN's: they have its symbols and do nothing. Operators are
then given reference implementations for CPU tensors, so that the real NPU code path runs
numerically.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / ".torch-npu"
EMPTY = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
CANN_SYMBOL = ("acl", "rt", "Hccl", "hccl", "Msprof")


def build_standins(folder):
    """Shared libraries with the symbols that torch-npu wants from CANN."""
    for name in EMPTY:
        compile_library(folder / f"lib{name}.so", "")
    libraries = sorted((PACKAGE / "torch_npu").glob("lib/*.so"))
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", *libraries], check=True, capture_output=True, text=True
    ).stdout
    names = {line.split()[-1] for line in listing.splitlines() if line.strip().startswith("U ")}
    wanted = sorted(n for n in names if n.startswith(CANN_SYMBOL) and "@" not in n)
    source = "\n".join(f"int {name}(void) {{ return 0; }}" for name in wanted)
    compile_library(folder / "libascendcl.so", source)


def compile_library(path, source):
    command = ["cc", "-shared", "-fPIC", "-o", str(path), "-x", "c", "-"]
    subprocess.run(command, input=source, text=True, check=True)


MISSING = not (PACKAGE / "torch_npu").is_dir() or not shutil.which("cc") or not shutil.which("nm")


@pytest.mark.skipif(
    MISSING and "CI" not in os.environ,  # a check that CI leaves out is none
    reason="needs torch-npu in .torch-npu (see the module's docstring), cc and nm",
)
def test_calls_fit_the_operators(tmp_path):
    build_standins(tmp_path)
    libraries = [str(tmp_path), str(Path(torch.__file__).parent / "lib")]
    environment = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(PACKAGE)]),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    script = Path(__file__).with_name("npu_calls.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-4:] == ["grouped_matmul", "permute", "swiglu", "rms_norm"]
