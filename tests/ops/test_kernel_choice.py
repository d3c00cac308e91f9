"""Which operators run as Triton kernels: where they can, those that hold; a line says which not."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import in_interpreter  # noqa: F401 - first
import pytest

from pangu import backends
from pangu.backends import cuda
from pangu.ops import trial
from pangu.ops.kernels import swiglu

ROOT = Path(__file__).parents[2]


def take(monkeypatch, **variants):
    """This process's backend with these, and what it had."""
    here = backends.current()
    operators = replace(here.operators, **variants)
    monkeypatch.setattr(backends, "_current", replace(here, operators=operators))
    return here.operators


def test_a_gpu_with_triton_runs_our_kernels(capsys):
    assert cuda.operators((9, 0), say=True) == cuda.OURS
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "replacement", "reason"),
    [
        ("importlib.util.find_spec", lambda name: None, "triton is not installed"),
        ("shutil.which", lambda name: None, "Triton finds no C compiler (gcc, clang or $CC)"),
    ],
)
def test_without_triton_or_a_compiler_one_line_says_so(
    name, replacement, reason, monkeypatch, capsys
):
    monkeypatch.setattr(name, replacement)
    assert cuda.operators((9, 0), say=True) == cuda.PLAIN
    assert capsys.readouterr().err == f"note: operators run in their plain forms: {reason}\n"


def test_an_old_gpu_runs_plain_forms(capsys):
    assert cuda.operators((7, 5), say=False) == cuda.PLAIN
    assert capsys.readouterr().err == ""


def test_kernels_that_hold_stay(monkeypatch):
    ours = {name: kind for name, kind in asdict(cuda.OURS).items() if kind == "triton"}
    plain = take(monkeypatch, **ours)
    assert trial.keep_what_holds(plain) == ""
    assert backends.current().operators == replace(plain, **ours)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda x, w: 1 / 0, "swiglu (division by zero)"),
        (lambda x, w: x.chunk(2, -1)[0] * w[:, None] * float("nan"), "swiglu (off by inf)"),
    ],
)
def test_a_kernel_that_fails_its_trial_is_not_used(broken, reason, monkeypatch):
    monkeypatch.setattr(swiglu, "swiglu", broken)
    plain = take(monkeypatch, swiglu="triton")
    assert trial.keep_what_holds(plain) == f"these operators run in their plain forms: {reason}"
    assert backends.current().operators == plain


def test_every_kernel_compiles_for_a_hopper_gpu(tmp_path):
    """Down to the machine's code, by the compiler that a GPU would be given it by; and all that a
    thread has in hand finds room in its registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_kernels", "short"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = {
        f"{file.stem}.{node.name}"
        for file in (ROOT / "pangu/ops/kernels").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and ast.unparse(node.returns) == "None"
        if [ast.unparse(each) for each in node.decorator_list] == ["triton.jit"]
    }
    found = json.loads(done.stdout)
    assert found.keys() == kernels
    assert {name for name, times in found.items() for each in times if each["spilled"]} == set()
