"""The end of a real run on two processes: sample, baselines, plots, summary."""

import json
import math
import subprocess
import sys

import pytest

from configs.schema import ParallelConfig
from pangu.report.run_files import read_metrics


@pytest.mark.distributed
@pytest.mark.end_to_end
def test_a_run_ends_with_its_losses_beside_n_grams_a_sample_and_plots(tmp_path):
    run = tmp_path / "run"
    overrides = [
        "experiment=quickstart",
        "debug=tiny",
        "model.vocab_size=64",
        "model.num_layers=2",
        "train.steps=6",
        "train.validate_every=3",
        "train.seq_length=64",
        "optimizer.warmup_steps=0",
        "backend=cpu",
        f"run_dir={run}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pangu.train", *overrides], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = read_metrics(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(row["device_imbalance"] == 0 for row in steps)  # MoGE, whole groups on both ranks
    assert all(row["dropped_tokens"] == 0 for row in steps)
    assert all(1 <= row["aux_loss"] < 4 for row in steps)
    assert "step 6/6: loss" in done.stderr
    assert f"held-out loss {rows[-1]['validation_loss']:.3f}" in done.stderr
    # Random tokens have nothing to learn but that they are even.
    baselines = json.loads((run / "baselines.json").read_text())
    for name in ("unigram", "bigram"):
        assert baselines[name]["held_out"] == pytest.approx(math.log(64), rel=0.05)
    table = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in done.stdout.splitlines()
        if line.startswith("│ ") and line.count("│") == 6
    }
    assert table["moge_tiny"][2] == f"{rows[-1]['validation_loss']:.3f}"
    assert table["bigram"][2] == f"{baselines['bigram']['held_out']:.3f}"
    sample = (run / "sample.txt").read_text().split()
    assert sample, "the model ended the document at once"
    assert all(0 < int(token) < 64 for token in sample)
    for name in ("loss.png", "expert_load.png", "report.html"):
        assert f"{run}/{name}" in done.stdout.replace("\n", "")
        assert (run / name).stat().st_size > 5000


def test_what_keeps_a_layout_from_generating_is_said():
    from pangu.inference.decode import obstacle

    assert obstacle(ParallelConfig(tensor_model_parallel_size=2)) == ""
    assert "pipeline" in obstacle(ParallelConfig(pipeline_model_parallel_size=2))
    assert "context" in obstacle(ParallelConfig(context_parallel_size=2))
