"""The wheel in a clean environment beside others' packages: a planner without torch."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("pangu", "simulator", "configs", "launch")
FORECAST = ["model=pangu_pro_moe", "parallel=pangu_pro", "hardware=ascend_910b_376t"]
FORECAST += ["devices=4000", "train.seq_length=4096", "train.global_batch_size=1000", "--json"]
# One module of each kind: a preset's reader, an entry point without torch, a launcher's reader.
PARTS = "import pangu.configs.compose, pangu.launch.environment, pangu.doctor, simulator.planner"


def run(*command: str | Path, cwd: Path) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_leaves_others_packages_alone_and_plans_without_torch(tmp_path: Path) -> None:
    source, user = tmp_path / "source", tmp_path / "user"
    for name in SOURCES:  # a copy: what setuptools keeps from a build before counts as part of it
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    run(*pip, *build, cwd=tmp_path)
    run(sys.executable, "-m", "venv", "--without-pip", user, cwd=tmp_path)
    python = user / "bin" / "python"
    site = next((user / "lib").glob("python*/site-packages"))
    for name in ("configs", "launch"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("THEIRS = True\n")
    wheel = next(tmp_path.glob("*.whl"))
    constraints = ROOT / "constraints.txt"
    run(*pip, "--python", python, "install", "--no-compile", "-c", constraints, wheel, cwd=tmp_path)

    ours = {"pangu", "simulator"}
    for file in (file for top in ours for file in (site / top).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] not in ("configs", "launch"), file
    for name in ("configs", "launch"):
        assert [file.name for file in (site / name).iterdir()] == ["__init__.py"]
    forecast = json.loads(run(python, "-m", "simulator", "predict", *FORECAST, cwd=tmp_path))
    here = run(sys.executable, "-m", "simulator", "predict", *FORECAST, cwd=ROOT)
    assert forecast == json.loads(here)
    run(python, "-c", f"{PARTS}; import configs, launch; assert launch.THEIRS", cwd=tmp_path)
    assert not any((site / heavy).exists() for heavy in ("torch", "matplotlib"))
    # What the planner alone cannot do it says, and the doctor looks at a plan all the same.
    for entry in ("train", "doctor"):
        command = [python, "-m", f"pangu.{entry}", "experiment=quickstart"]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert said.returncode == 2, said.stderr
        assert "pip install 'pangu-moe[train]'" in said.stdout + said.stderr
