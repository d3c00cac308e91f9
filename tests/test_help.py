"""`--help` of every command answers before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "megatron", "hydra", "omegaconf", "pydantic", "transformers", "matplotlib"}
RUN = f"""
import atexit, runpy, sys
module, sys.argv = sys.argv[1], [*sys.argv[1:], "--help"]
heavy = {sorted(HEAVY)!r}
atexit.register(lambda: print("HEAVY", *(name for name in heavy if name in sys.modules)))
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def commands() -> list[str]:
    """Every module of ours that a user runs with options."""
    files = [file for top in ("pangu", "simulator") for file in (ROOT / top).rglob("*.py")]
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for file in files
        if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    ]
    return sorted(modules)


def test_there_are_some() -> None:
    assert {"pangu.train", "pangu.convert", "pangu.report", "simulator"} <= set(commands())


@pytest.mark.parametrize("module", commands())
def test_help_imports_nothing_heavy(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, module], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    *words, heavy = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert any(line.strip() for line in words)
    assert heavy.split() == ["HEAVY"]
