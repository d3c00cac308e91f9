"""On a device that works behind its host a step is read when the next one is queued: rows,
judgement of bad steps and checkpoints are those of a run that reads every step at once."""

from dataclasses import replace

import in_interpreter  # noqa: F401 - before any kernel
import waits
from checkpoint_runs import MODEL
from gloo import run

from configs.compose import load
from pangu import backends
from pangu.checkpoint import manifest
from pangu.report.run_files import METRICS, read_metrics
from pangu.training.resilience import StopSignal

NEVER = 10**9
OF_TIME = ("seconds", "per_second", "tflops", "memory", "mfu", "beside")
SAVES = ["train.steps=5", "checkpoint.save_every=2", "checkpoint.async_save=false"]
SAVES += ["checkpoint.keep_last=9"]


class Told(StopSignal):
    """Told to stop once the step is queued."""

    def __init__(self, step):
        super().__init__()
        self.step = step


def trained(folder, overrides, *, late, bad=NEVER, told=NEVER):
    """(exit code, rows without times, steps that were saved, what asked while steps were queued,
    how many were under way at most)."""
    import torch
    from megatron.core import parallel_state

    from pangu.engines.megatron import process_groups
    from pangu.training.run import build_trainer

    config = load([*MODEL, "launch.processes=1", f"run_dir={folder}", *overrides])
    process_groups.initialize(config)
    here = backends.current()
    backends._current = replace(here, asynchronous=late)
    stop = Told(told)
    trainer = build_trainer(config, stop)
    one_step, asked, queued = trainer.one_step, [], []

    def watched(batches):
        step = trainer.state.step + 1
        stop.requested = stop.requested or step == told
        weight = next(trainer.engine.chunks[0].parameters())
        kept = weight.detach().clone()
        if step == bad:
            with torch.no_grad():
                weight.fill_(float("nan"))
        with waits.noticed() as found:
            one_step(batches)
        if step == bad:
            with torch.no_grad():
                weight.copy_(kept)
        asked.extend(found if step > 1 else [])  # the engine moves its rotary frequencies once
        queued.append(len(trainer.under_way._queue))

    trainer.one_step = watched
    code = trainer.train()
    backends._current = here
    parallel_state.destroy_model_parallel()
    rows = [
        {name: value for name, value in row.items() if not any(part in name for part in OF_TIME)}
        for row in read_metrics(folder / METRICS)
    ]
    saved = sorted(manifest.step_of(each) for each in manifest.complete(folder / "checkpoints"))
    return code, rows, saved, asked, max(queued)


def runs(folder):
    found = {
        "at once": trained(folder / "at once", SAVES, late=False, bad=4),
        "late": trained(folder / "late", SAVES, late=True, bad=4),
        "told": trained(folder / "told", SAVES, late=True, told=3),
    }
    of_a_device = {"grouped_matmul": "fused", "weight_gradient": "separate"}
    backends.use(replace(backends.current().operators, **of_a_device))
    return found | {"asked": trained(folder / "asked", ["train.steps=3"], late=True)}


def test_a_run_that_is_read_late_is_one_that_is_read_at_once(tmp_path):
    (found,) = run(1, runs, tmp_path)
    assert found["late"][:3] == found["at once"][:3]
    assert (found["at once"][4], found["late"][4]) == (1, 2)
    code, rows, saved, *_ = found["late"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if row["loss"] is None] == [4]
    assert (code, saved) == (0, [2, 5])  # a bad step is known before it would be saved
    code, rows, saved, *_ = found["told"]  # known when step 3 is read, beside step 4
    assert (code, rows[-1]["step"], saved) == (0, 4, [2, 4])
    assert found["asked"][3] == []
