"""Pruning a run: rows of its checkpoint as they are, whichever layout wrote them; and training of
what is left goes on."""

import shutil

import checkpoint_runs
import gloo
import pytest
import torch
from compression.ours import logits
from compression.tiny import compress

from pangu.checkpoint.run_tensors import RunTensors
from pangu.checkpoint.tensor_files import WeightsError
from pangu.checkpoint.tensor_rows import TensorRows
from pangu.task_experts import TaskChoice, opened
from pangu.trained_model import loaded

# Every tensor is cut: experts by their width, others by rows or columns.
CUT = ["parallel.tensor_model_parallel_size=2", "parallel.expert_tensor_parallel_size=2"]
TEXT = " ".join(str(number * number) for number in range(200))  # synthetic tokens are numbers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trained for two steps by two ranks."""
    folder = tmp_path_factory.mktemp("run") / "run"
    overrides = ["train.steps=2", "model.num_layers=2", "checkpoint.keep_last=1"]
    gloo.run(2, checkpoint_runs.train, folder, [*overrides, *CUT])
    (folder / "text").write_text(TEXT)
    return folder


def step_of(run):
    return run / "checkpoints" / "step_00000002"


@pytest.mark.distributed
def test_rows_are_those_of_the_whole_tensors(run):
    rows, whole = TensorRows(step_of(run)), RunTensors(step_of(run))
    assert set(rows.names()) == set(whole.names())
    for name in whole.names():
        expected = whole.read(name)
        assert rows.shape(name) == tuple(expected.shape)
        assert torch.equal(rows.read(name), expected)
        some = [n for n in (3, 0, 1, 5) if n < len(expected)]
        before = rows.bytes_read
        assert torch.equal(rows.rows(name, some), expected[some])
        assert rows.bytes_read - before == expected[some].nbytes


@pytest.mark.distributed
def test_what_is_no_archive_of_one_tensor_is_refused(run, tmp_path):
    shutil.copytree(step_of(run), tmp_path / "step")
    for file in (tmp_path / "step").glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(WeightsError, match="something else than tensors"):
        TensorRows(tmp_path / "step")


@pytest.mark.distributed
def test_a_run_gives_its_experts_to_a_task_and_goes_on_with_half_of_them(run, tmp_path):
    words = ["prune-experts", run, "--task", run / "text", "--window", 16, "--backend", "cpu"]
    assert compress([*words, "--out", tmp_path / "half", "--store", tmp_path / "store"]) == 0
    rows = torch.arange(2 * 16).view(2, 16) * 7 % 256
    with opened(run, "cpu", TaskChoice(tmp_path / "store")) as ((model, _, _), experts):
        experts.hold("text")
        found = logits(model, rows)
    with loaded(tmp_path / "half", "cpu") as (model, _, _):
        assert torch.equal(found, logits(model, rows))
    overrides = ["model.num_experts=4", "model.num_layers=2", "train.steps=3"]
    overrides += [f"checkpoint.resume={tmp_path / 'half'}", "parallel.expert_model_parallel_size=2"]
    steps, _ = gloo.run(2, checkpoint_runs.train, tmp_path / "on", overrides)[0]
    assert len(steps) == 3
    assert all(loss == loss for loss, _ in steps.values())
