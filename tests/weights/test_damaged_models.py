"""What cannot be read, or is no model, is one sentence; nothing half written is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gloo
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from weights.test_round_trip import SCALED, save_theirs

from configs.violation import ConfigError
from pangu import evaluate
from pangu.checkpoint.tensor_files import Safetensors, WeightsError
from pangu.command_line import run
from pangu.compression.texts import new_model
from pangu.convert import main
from pangu.data.tokenizer import NumberTokenizer
from pangu.weights.convert import import_model
from pangu.weights.model_folder import describe, seal
from pangu.weights.writer import ModelFolder


def damage_shard(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_tensor(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    save_file({**held, "model.layers.7.odd": torch.ones(1)}, folder / "model.safetensors")


def poison(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    held["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(held, folder / "model.safetensors")


def test_weights_that_are_no_numbers_do_not_go_out(tmp_path, capsys):
    """Of a model that has been written so; and nothing is judged by it."""
    save_theirs("llama", tmp_path / "theirs")
    config = import_model(tmp_path / "theirs", tmp_path / "ours")
    held = Safetensors(tmp_path / "ours")
    tensors = {name: held.read(name) for name in held.names()}
    tensors["decoder.layers.1.mlp.linear_fc2.weight"][3, 5] = float("nan")
    with ModelFolder(tmp_path / "broken") as folder:
        for name, tensor in tensors.items():
            folder.add(name, tensor)
        folder.finish()
        describe(folder, config)
        NumberTokenizer(64).save(folder.partial / "tokenizer")
        seal(folder)
    assert main(["export", str(tmp_path / "broken"), "--out", str(tmp_path / "out")]) == 2
    assert "linear_fc2.weight holds numbers that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "text").write_text("1 2 3 4 5")
    gloo.leave()
    words = [str(tmp_path / "broken"), "--text", str(tmp_path / "text"), "--window", "16"]
    assert evaluate.main(words) == 2
    assert "predictions are not finite numbers" in capsys.readouterr().err


def eight_bit(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in held.items()}
    save_file(small, folder / "model.safetensors")


def missing_shard(folder: Path) -> None:
    table = dict.fromkeys(
        load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors"
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def escaping_shard(folder: Path) -> None:
    table = dict.fromkeys(load_file(folder / "model.safetensors"), "../theirs/model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def edit(**changes):
    def change(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_shard, "damaged or incomplete"),
        (drop_tensor, "model.layers.1.mlp.up_proj.weight is missing"),
        (add_tensor, "model.layers.7.odd is extra"),
        (poison, "not finite"),
        (missing_shard, "which is missing"),
        (escaping_shard, "no file name"),
        (edit(architectures=["GPT2LMHeadModel"]), "known are LlamaForCausalLM"),
        (edit(num_hidden_layers=4), "missing"),
        (edit(hidden_size="wide"), "config.json"),
        (edit(hidden_size=36), "numbers, and sizes in config.json ask for"),
        (edit(num_key_value_heads=3), "model.num_query_groups=3"),
        (edit(num_hidden_layers=0), "model.num_layers=0"),
        (edit(num_attention_heads=0, head_dim=8), "model.num_attention_heads=0"),
        (edit(rms_norm_eps=-1.0), "model.norm_epsilon=-1"),
        (edit(max_position_embeddings=0), "model.max_position_embeddings=0"),
        (eight_bit, "is stored as float8_e4m3fn"),
        (edit(rope_parameters={"rope_type": "dynamic", "factor": 4.0}), "(dynamic): not supported"),
        (edit(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "'original_max_position_emb"),
        (edit(rope_parameters={**SCALED, "rope_type": "yarn", "factor": "x"}), "is no number"),
        (edit(rope_scaling="yarn"), "rope_scaling is no table"),
        (edit(num_attention_heads="four"), "config.json"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            "theirs/tokenizer.json cannot",
        ),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "is missing"),
    ],
)
def test_damage_is_one_sentence_and_no_folder(damage, words, tmp_path, capsys):
    save_theirs("llama", tmp_path / "theirs")
    damage(tmp_path / "theirs")
    code = main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    error = capsys.readouterr().err
    assert code == 2
    assert words in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_is_there_is_left_alone(tmp_path, capsys):
    """A folder, a file, links to an empty folder and to nothing; and what came while it wrote."""
    save_theirs("llama", tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "to nothing").symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.rglob("*"))
    for name in ("ours", "ours/precious", "link", "to nothing"):
        assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / name)]) == 2
        assert "name a new folder" in capsys.readouterr().err
        with pytest.raises(ConfigError, match="name a new folder"), new_model(tmp_path / name):
            pass
    late = pytest.raises(WeightsError, match="late could not be written")
    with late, ModelFolder(tmp_path / "late") as folder:
        folder.finish()
        shutil.copytree(tmp_path / "ours", tmp_path / "late")
    with pytest.raises(ConfigError, match="could not be written"), new_model(tmp_path / "late2"):
        shutil.copytree(tmp_path / "ours", tmp_path / "late2")
    assert (tmp_path / "late" / "precious").read_text() == "mine"
    left = [path for path in tmp_path.rglob("*") if "late" not in str(path)]
    assert sorted(left) == before


def test_where_no_folder_can_be_made(tmp_path, capsys):
    """Not by root either."""
    save_theirs("llama", tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), "--out", "/proc/new"]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said.startswith("error: --out=/proc/new: cannot be made: ")
    with pytest.raises(ConfigError, match="cannot be made"), new_model(Path("/proc/new")):
        pass


def test_a_full_disk_is_a_sentence(tmp_path):
    """The kernel's own error, from a limit on the size of files."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from pangu.checkpoint import WeightsError
from pangu.weights.distill_patch import store_logits
from pangu.weights.writer import ModelFolder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    store_logits(None, torch.zeros(10, 100), 10, Path({str(tmp_path)!r}))
except WeightsError as error:
    print(error)
with ModelFolder(Path({str(tmp_path / "out")!r})) as folder:
    folder.add("large", torch.ones(10_000))
    folder.finish()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert run.stderr.splitlines()[-1].startswith("pangu.checkpoint.WeightsError: ")
    assert "could not be written" in run.stderr
    assert "--distill: no room for" in run.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {"indices.npy"}


def test_a_folder_that_nobody_else_may_look_into_is_a_sentence(tmp_path, capsys):
    app = typer.Typer()

    @app.command()
    def look() -> None:
        before = os.geteuid()
        (tmp_path / "shut").mkdir(mode=0o000)
        if before == 0:  # to whom it is open
            os.seteuid(65534)
        try:
            (tmp_path / "shut" / "file").exists()
        finally:
            os.seteuid(before)

    assert run(app, []) == 2
    assert f"error: {tmp_path}/shut/file: Permission denied\n" == capsys.readouterr().err


def test_a_command_that_is_told_to_end_leaves_nothing(tmp_path):
    app = typer.Typer()

    @app.command()
    def work() -> None:
        with ModelFolder(tmp_path / "out") as folder:
            folder.add("half", torch.ones(2))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        run(app, [])
    assert left.value.code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
