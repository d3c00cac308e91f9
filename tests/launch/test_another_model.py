"""A checkpoint of another model is refused by trainer and doctor before a process starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.compose import load, to_yaml
from pangu.preflight import another_model

SMALL = ["data=synthetic", "model.num_layers=2"]


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder as it is named and described; what it holds is not looked at here."""
    for step in (3, 12):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(load([*SMALL, f"moe.top_k={step}"])))
    return tmp_path / "run"


def keys(overrides: list[str]) -> list[str]:
    return [violation.key for violation in another_model(load([*SMALL, *overrides]))]


def test_the_newest_checkpoint_is_compared(run):
    assert keys([f"run_dir={run}", "moe.top_k=12"]) == []
    assert keys([f"run_dir={run}", "moe.top_k=3"]) == ["moe.top_k"]
    assert keys([f"run_dir={run}", "moe.top_k=12", "model.num_layers=4"]) == ["model.num_layers"]
    assert keys([f"run_dir={run}", "moe.top_k=3", "checkpoint.allow_changes=[moe.top_k]"]) == []
    assert keys([f"run_dir={run}", "moe.top_k=3", "checkpoint.resume=never"]) == []


def test_a_named_run_or_checkpoint_is_compared(run, tmp_path):
    elsewhere = f"run_dir={tmp_path / 'new'}"
    older = run / "checkpoints" / "step_00000003"
    assert keys([elsewhere, "moe.top_k=3", f"checkpoint.resume={run}"]) == ["moe.top_k"]
    assert keys([elsewhere, "moe.top_k=3", f"checkpoint.resume={older}"]) == []
    assert keys([elsewhere, "moe.top_k=12", f"checkpoint.resume={older}"]) == ["moe.top_k"]


def test_a_new_run_and_a_damaged_description_are_left_to_the_run(run, tmp_path):
    assert keys([f"run_dir={tmp_path / 'nowhere'}", "moe.top_k=3"]) == []
    (run / "checkpoints" / "step_00000012" / "config.yaml").write_bytes(b"\x00[")
    assert keys([f"run_dir={run}", "moe.top_k=3"]) == []


@pytest.mark.end_to_end
def test_both_commands_say_the_same(run):
    for command in ("pangu.train", "pangu.doctor"):
        arguments = [*SMALL, f"run_dir={run}", "moe.top_k=2", "moe.num_expert_groups=1"]
        done = subprocess.run(
            [sys.executable, "-m", command, *arguments, "moe=top_k"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2, done.stderr
        assert "moe.top_k" in done.stdout + done.stderr
        assert "allow_changes" in done.stdout + done.stderr
