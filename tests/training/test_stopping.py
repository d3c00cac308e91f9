"""Told to stop in the middle of something long, and ends among steps that were not finite."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import MODEL
from gloo import run
from test_resilience import finish, losses, saved, start, wait_for

from configs.compose import load
from pangu.report.run_files import METRICS, SAMPLE, read_metrics
from pangu.training.resilience import StopSignal

ENDLESS = ["train.validate_every=2", "train.validation_batches=100000"]


@pytest.mark.end_to_end
def test_a_stop_is_heard_between_validation_batches_by_all_ranks(tmp_path):
    process = start(tmp_path, "train.steps=4", "launch.processes=2", *ENDLESS)
    wait_for(process, lambda: max(losses(tmp_path), default=0) == 2)
    time.sleep(0.5)  # into the validation, which would take an hour
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 0, output
    assert saved(tmp_path) == [2]
    assert "SIGTERM: stopping when what is under way is done" in output
    assert "step 2: validation given up after " in output
    assert not any("validation_loss" in row for row in read_metrics(tmp_path / METRICS))


class StopAt(StopSignal):
    """Told to stop when it is asked for the `call`-th time (from 1)."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = call

    def agreed(self) -> bool:
        self.left -= 1
        self.requested = self.requested or self.left <= 0
        return super().agreed()


def trained(folder: Path, stop: StopSignal, *overrides: str, spoil_before: int = 0) -> Any:
    """(exit code, trainer) of a run in this process; its weights are spoilt before a step."""
    from pangu.engines.megatron import process_groups
    from pangu.training.run import build_trainer

    config = load([*MODEL, "launch.processes=1", f"run_dir={folder}", *overrides])
    process_groups.initialize(config)
    trainer = build_trainer(config, stop)
    one_step = trainer.one_step

    def spoilt(batches: Any) -> Any:
        if trainer.state.step + 1 == spoil_before:
            with torch.no_grad():
                next(trainer.engine.chunks[0].parameters()).fill_(float("nan"))
        return one_step(batches)

    trainer.one_step = spoilt
    return trainer.train(), trainer


def left() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def alone(folder: Path) -> dict[str, Any]:
    """What single-process runs of this model came to."""
    from pangu.training.finish import finish, sample

    found: dict[str, Any] = {}
    never = 10**9

    code, trainer = trained(folder / "bad", StopAt(never), "optimizer.lr=1e38", "train.steps=3")
    skipped, text = trainer.skipped.in_a_row, trainer.lost()
    finish(trainer)
    found["bad"] = code, skipped, text, (folder / "bad" / SAMPLE).read_text()
    left()

    # Asked before steps 1 to 4, and before the fifth, which is not taken.
    code, trainer = trained(folder / "mid", StopAt(5), "train.steps=9", spoil_before=4)
    found["mid"] = code, trainer.state.step, trainer.lost()
    left()

    # Once before the only step, then before validation batches.
    short = ["train.steps=1", "train.validate_every=1", "train.validation_batches=50"]
    code, trainer = trained(folder / "cut", StopAt(4), *short)
    found["cut"] = code, [sorted(row)[0] for row in read_metrics(folder / "cut" / METRICS)]
    left()

    # Once before the step; then once per token.
    code, trainer = trained(folder / "whole", StopAt(5), "train.steps=1", "model.vocab_size=300")
    tokens = sample(trainer).split()
    found["tokens"] = code, len(tokens)
    finish(trainer)
    found["report"] = (folder / "whole" / "report.html").exists()
    left()

    none = ["train.steps=1", "train.validate_every=1", "train.validation_batches=0"]
    code, trainer = trained(folder / "none", StopAt(never), *none)
    finish(trainer)
    found["none"] = code, [sorted(row)[0] for row in read_metrics(folder / "none" / METRICS)]
    left()
    return found


def test_what_runs_of_one_process_end_with(tmp_path, capfd):
    (found,) = run(1, alone, tmp_path)
    code, skipped, text, sample = found["bad"]
    assert (code, skipped) == (3, 2)
    assert "error: the last 2 steps were not finite" in text
    assert "steps 1 to 3 are in no checkpoint (there is none)" in text
    assert sample == "No sample: the model's predictions are not finite numbers."
    assert saved(tmp_path / "bad") == []

    code, step, text = found["mid"]
    assert (code, step) == (1, 4)
    assert "error: step 4 was not finite" in text
    assert text.endswith("Start the same command again: it goes on from there.")
    assert saved(tmp_path / "mid") == []

    code, rows = found["cut"]
    assert code == 0
    assert len(rows) == 1, "no validation loss of a part of the batches"
    assert saved(tmp_path / "cut") == [1]

    code, rows = found["none"]
    assert (code, len(rows)) == (0, 1), "no validation"

    assert found["tokens"] == (0, 4)
    assert not found["report"]
    errors = capfd.readouterr().err
    assert "step 1: validation given up after 2 of 50 batches" in errors
    assert "told to stop: no report was written; python -m pangu.report" in errors


@pytest.mark.end_to_end
def test_more_validation_than_is_held_out_is_a_warning_at_the_start(tmp_path):
    from pangu.data.corpus import Preparation, prepare

    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"document {number} of twenty, all alike. " * 20)
    corpus = tmp_path / "corpus"
    prepare(Preparation([text], corpus, train_tokenizer=256 + 1, held_out=0.2, workers=1))
    tokens = (corpus / "validation.bin").stat().st_size // 2
    held = (tokens - 1) // 16
    process = start(
        tmp_path / "run",
        *["data=indexed", f"data.blend={{{corpus}: 1}}", f"data.cache_dir={tmp_path}"],
        *["model.vocab_size=512", "train.steps=1", "train.validate_every=1"],
        f"train.validation_batches={held // 8 + 2}",
    )
    code, output = finish(process)
    assert code == 0, output
    warning = f"and the held-out corpus holds {held}: some count more than once. {held // 8} batch"
    assert warning in output
    assert output.index(warning) < output.index("step 1/1"), "at the start"


def test_a_signal_is_answered_at_once_and_once(tmp_path):
    child = (
        "import os, signal, time; from pangu.training.resilience import StopSignal\n"
        "stop = StopSignal(); os.kill(os.getpid(), signal.SIGTERM)\n"
        "os.kill(os.getpid(), signal.SIGINT); assert stop.requested\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "SIGTERM: stopping when what is under way is done\n"
