"""A real run on two processes, by DeepSpeed, to its end: sample, baselines, plots, summary; then
generation from its checkpoint by one process."""

import json
import math
import subprocess
import sys

import gloo
import pytest
import torch

from configs.schema import ParallelConfig
from pangu.checkpoint import manifest
from pangu.generate import main
from pangu.report.run_files import read_metrics
from pangu.trained_model import read_run_config


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The run's folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides = [
        "experiment=quickstart",
        "engine=deepspeed",  # those of the other run to their ends in many tests
        "parallel.zero_stage=2",
        "debug=tiny",
        "model.vocab_size=64",
        "model.num_layers=2",
        "train.steps=6",
        "train.validate_every=3",
        "train.seq_length=64",
        "optimizer.warmup_steps=0",
        "backend=cpu",
        f"run_dir={folder}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pangu.train", *overrides], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.distributed
@pytest.mark.end_to_end
def test_a_run_ends_with_its_losses_beside_n_grams_a_sample_and_plots(ended):
    run, done = ended
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


def generated(*arguments):
    command = [sys.executable, "-m", "pangu.generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def greedy_by_whole_forward(folder, tokens, count):
    """`count` tokens, each the argmax of a forward pass over all tokens before it."""
    gloo.single()
    gloo.parallel(tensor_model_parallel_size=1)
    from pangu.trained_model import load_for_inference

    model, _ = load_for_inference(read_run_config(folder), folder)
    model.eval()
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
        tokens = [*tokens, int(logits[0, -1].argmax())]
    return tokens[-count:]


@pytest.mark.distributed
@pytest.mark.end_to_end
def test_one_process_generates_from_the_checkpoint_of_two(ended, monkeypatch, tmp_path):
    run, _ = ended
    looked_through = []
    damage = manifest.damage
    monkeypatch.setattr(
        manifest, "damage", lambda path, *rest: looked_through.append(path) or damage(path, *rest)
    )
    done = generated(f"checkpoint={run}", "prompt=7 33 12 ", "max_new_tokens=5", "temperature=0")
    assert done.returncode == 0, done.stderr
    expected = greedy_by_whole_forward(run, [7, 33, 12], 5)
    assert 0 not in expected, "the document ended: choose another prompt"
    assert len(looked_through) == 1, "checksums of a large checkpoint take their time: once"
    assert done.stdout.split() == ["7", "33", "12", *map(str, expected)]
    file = tmp_path / "prompts.txt"
    file.write_text(f"{' '.join(map(str, [7, 33, 12, *expected[:2]]))}\n7 33 12\n")
    options = ["max_new_tokens=5", "temperature=0", "speculative=draft", f"draft={run}"]
    done = generated(f"checkpoint={run}", f"prompts={file}", *options)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    lines, part = done.stdout.splitlines(keepends=True), tmp_path / "answers.jsonl"
    part.write_text(lines[0])
    done = generated(f"checkpoint={run}", f"prompts={file}", f"output={part}", *options[:2])
    assert (done.stdout, part.read_text()) == ("", "".join(lines)), done.stderr
    assert second["text"].split() == list(map(str, expected))
    assert first["text"].split()[:3] == list(map(str, expected[2:]))
    assert second["finish"] == "length"


@pytest.mark.distributed
@pytest.mark.end_to_end
def test_a_damaged_checkpoint_is_a_sentence_and_exit_code_2(ended):
    run, _ = ended
    (saved,) = (run / "checkpoints").glob("step_*")
    part = next(saved.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    done = generated(f"checkpoint={saved}")
    assert done.returncode == 2
    assert "is no sound checkpoint" in done.stderr
    assert part.name in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["checkpoint=nowhere"], "checkpoint=nowhere: is neither a run folder nor a checkpoint"),
        (["run"], "run=: is not of the form key=value"),
        (["prompt=x"], "checkpoint=: is missing (checkpoint=RUN_DIR)"),
        (["checkpoint=x", "promt=y"], "promt=y: unknown key (known: checkpoint, prompt"),
        (["checkpoint=x", "temperature=-1"], "temperature=-1.0: must be 0 or more"),
        (["checkpoint=x", "prompt=a", "prompts=b"], "prompts=b: give either prompt or prompts"),
        (["checkpoint=x", "prompts=nowhere"], "prompts=nowhere: [Errno 2] No such file"),
        (["checkpoint=x", "speculative=draft"], "draft=: speculative=draft and draft=DIR belong"),
        (["checkpoint=x", "speculative.tokens=0"], "speculative.tokens=0: 1 to 64 guesses"),
        (["checkpoint=x", "min_p=2"], "min_p=2.0: a part is 0 to 1"),
        (["checkpoint=x", "top_p=0"], "top_p=0.0: a probability is more than 0 and at most 1"),
        (
            ["checkpoint=x", "inference.kv_dtype=int8"],
            "inference.kv_dtype=int8: unknown key",
        ),
        (["checkpoint=x", "inference.max_new_tokens=0"], "max_new_tokens=0: a number of tokens is"),
        (["checkpoint=x", "max_new_tokens=many"], "max_new_tokens=many: input should be a valid"),
        (
            ["x=y", "seed=-1", "temperature=nan", "max_new_tokens=many"],
            "\nseed=-1: must be 0 or more",
        ),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("content", ["model: [", "", "[1]", "model: {name: x}"])
def test_a_configuration_that_cannot_be_read_is_a_sentence(content, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    assert main([f"checkpoint={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint={file}: cannot be read: ")


def test_what_keeps_a_layout_from_generating_is_said():
    from pangu.inference.forward import obstacle

    assert obstacle(ParallelConfig(tensor_model_parallel_size=2)) == ""
    assert "pipeline" in obstacle(ParallelConfig(pipeline_model_parallel_size=2))
    assert "context" in obstacle(ParallelConfig(context_parallel_size=2))
