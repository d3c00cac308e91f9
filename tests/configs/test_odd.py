"""The default tests' share of `python -m tests.configs.odd`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from odd import generate, outcome

ROOT = Path(__file__).parents[2]


def test_doctor_and_trainer_give_one_verdict_on_odd_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {str(line): outcome(line)[0] for line in generate(25, tmp_path / "files", seed=7)}
    assert set(found.values()) == {"both accept", "both refuse"}, found


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("optimizer.lr=nan", "must be finite"),
        ("launch.processes=1000000", "must be at most 1024"),
        ("experiment=files/itself.yaml", "aliases are not read"),
    ],
)
def test_the_commands_refuse_in_a_sentence(tmp_path, argument, said):
    list(generate(0, tmp_path / "files"))  # writes them
    for command in ("train", "doctor"):
        done = subprocess.run(
            [sys.executable, "-m", f"pangu.{command}", argument],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert said in " ".join((done.stdout + done.stderr).replace("│", " ").split())
