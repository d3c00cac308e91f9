"""Moments that lie in a file between steps are saved as they were, however late the writer is."""

import time
from pathlib import Path

import pytest
from checkpoint_runs import Steps, train
from gloo import run

SAVED, STEPS = 2, 5


def saved_late_and_resumed(folder: Path) -> tuple[Steps, Steps]:
    """A run whose forked writer begins after further steps would be over; and the same, resumed."""
    from pangu.checkpoint import saver

    write = saver._write

    def late(*arguments: object) -> None:
        time.sleep(2)
        write(*arguments)

    overrides = ["memory.swap_optimizer=true", f"checkpoint.save_every={SAVED}"]
    overrides += [f"train.steps={STEPS}", "checkpoint.keep_last=9", "checkpoint.save_at_end=false"]
    saver._write = late
    straight, _ = train(folder / "run", overrides)
    saver._write = write
    source = folder / "run" / "checkpoints" / f"step_{SAVED:08}"
    resumed, _ = train(folder / "resumed", [*overrides, f"checkpoint.resume={source}"])
    return straight, resumed


@pytest.mark.distributed
def test_a_save_holds_the_moments_of_its_own_step(tmp_path: Path) -> None:
    straight, resumed = run(1, saved_late_and_resumed, tmp_path)[0]
    later = range(SAVED + 1, STEPS + 1)
    assert {step: resumed[step] for step in later} == {step: straight[step] for step in later}
