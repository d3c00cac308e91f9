"""Steps one after the other, stopped in the middle and gone on with."""

import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from compression.ours import load_ours, logits
from compression.tiny import VOCABULARY, compress, llama
from gloo import leave
from serving.tiny_server import client, server_of, serving
from transformers import AutoModelForCausalLM

from configs.violation import ConfigError
from pangu import convert, generate
from pangu.checkpoint.tensor_files import Safetensors
from pangu.compression import chain
from pangu.run_lock import hold
from pangu.trained_model import loaded
from pangu.weights.quantized_file import Quantized, weight_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    llama(folder, hidden_size=64, intermediate_size=64, num_hidden_layers=4)
    return folder


def described(folder, **changes):
    text, task = str(folder / "text"), str(folder / "task.jsonl")
    common = {"calibration": text, "tokens": 128, "window": 32}
    steps = [
        {"prune-layers": {"layers": 1, "patch": "diagonal", **common}},
        {"carve": {"experts": "S1A2E4", **common}},
        {"prune-experts": {"keep": 0.7, "task": [text, task], "tokens": 128, "window": 32}},
        {"quantize": {"scheme": "W4A16", "group_size": 32, **common}},
        {"export": {}},
    ]
    found = {"model": str(folder / "ours"), "out": str(folder / "out"), "text": text}
    request = {"doc_id": 0, "label": 1}
    answers = [{**request, "request": {"context": "a", "continuation": text}} for text in "bc"]
    Path(task).write_text("".join(json.dumps(line) + "\n" for line in answers))
    found["tasks"] = [task]
    file = folder / "chain.yaml"
    file.write_text(
        yaml.safe_dump({**found, "tokens": 128, "window": 32, "steps": steps} | changes)
    )
    return file


def in_this_process(words):
    """What a process of its own would print: each takes seconds to import torch."""
    leave()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert importlib.import_module(words[0]).main(words[1:]) == 0
    return printed.getvalue()


NAMES = ["as it was", *chain.STEPS]


def test_all_methods_one_after_the_other_with_a_stop_in_between(folder, monkeypatch, capsys):
    ran, run = [], chain._run

    def stops(words):
        ran.append(words[1])
        if words[1] == "export" and ran.count("export") == 1:
            raise KeyboardInterrupt
        return run(words) if len(ran) == 1 else in_this_process(words)

    monkeypatch.setattr(chain, "_run", stops)
    with pytest.raises(KeyboardInterrupt):
        chain.run_chain(chain.read_chain(described(folder)))
    first = len(ran)
    with hold(folder / "out", chain.LOCK):
        assert compress(["chain", described(folder)]) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert compress(["chain", described(folder)]) == 0
    assert ran[first:] == ["export"]  # the rest was done
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines[1:-1]] == NAMES
    rows = json.loads((folder / "out" / chain.DONE).read_text())
    sizes = [row["bytes"] for row in rows]
    assert sizes[0] > sizes[1] < sizes[2] > sizes[3] > sizes[4] > 0  # carving adds a router
    assert len({row["perplexity"] for row in rows[:5]}) == 5
    assert all(row["accuracies"].keys() == {"task.jsonl"} for row in rows[:5])
    options = {"dtype": torch.float32, "trust_remote_code": True}
    read = AutoModelForCausalLM.from_pretrained(folder / "out" / "5-export", **options).eval()
    ids = torch.arange(2 * 24).view(2, 24) * 7 % VOCABULARY
    with torch.no_grad():
        found = read(ids, use_cache=False).logits
    assert (found - logits(load_ours(folder / "out" / "4-quantize"), ids)).abs().max() <= 1e-4
    file = described(folder, steps=[{"prune-layers": {"layers": 2}}])
    assert compress(["chain", file]) == 2
    assert "step 1 was another one" in capsys.readouterr().err
    whole = (folder / "out" / chain.DONE).read_text()
    (folder / "out" / chain.DONE).write_text(whole[:-9])
    assert compress(["chain", described(folder)]) == 2
    assert "holds no finished steps" in capsys.readouterr().err


def test_bytes_of_weights(folder):
    """Every weight by hand."""
    found = folder / "out" / "4-quantize"
    source = Safetensors(found)
    codes, total = Quantized.of(found).weights, 0
    for name in source.names():
        count = source.read(name).numel()
        total += count * (4 + 16 / 16) / 8 if name in codes else 4 * count  # a scale each 16
    assert weight_bytes(found) == total


@pytest.mark.parametrize("step", chain.STEPS[:4])
def test_what_each_step_leaves_answers(step, folder, capsys):
    """pangu.generate and the server go on as the plain model does, whose cache is not asked."""
    (path,) = (folder / "out").glob(f"?-{step}")
    leave()
    with loaded(path, "cpu") as trained:
        ids = trained.tokenizer.encode("class")
        for _ in range(4):
            ids.append(int(logits(trained.model, torch.tensor([ids]))[0, -1].argmax()))
        expected = trained.tokenizer.decode(ids)
        options = {"model": "tiny", "prompt": "class", "max_tokens": 4, "temperature": 0}
        with serving(server_of(path, trained, name="tiny")) as address:
            found = client(address).completions.create(**options)
    assert "class" + found.choices[0].text == expected
    words = [f"checkpoint={path}", "prompt=class", "max_new_tokens=4", "temperature=0"]
    assert generate.main([*words, "backend=cpu"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_mistakes(folder, capsys):
    for changes, message in (
        ({"steps": []}, "steps="),
        ({"steps": [{"quantize": {}, "export": {}}]}, "each is one command"),
        ({"steps": [{"quantise": {}}]}, "is none of prune-layers, carve"),
    ):
        assert compress(["chain", described(folder, **changes)]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert compress(["chain", Path("nowhere.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="exit code 1"):
        chain._run(["no_such_module"])


def until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_step_is_killed_with_its_chain(tmp_path):
    """Else it would write beside the one that begins the step again."""
    (tmp_path / "endless.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path('new').write_text(str(os.getpid()))\n"
        "os.rename('new', 'pid')\n"
        "time.sleep(60)\n"
    )
    code = "from pangu.compression.chain import _run; _run(['endless'])"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) as parent:
        until((tmp_path / "pid").exists)
        parent.kill()
    child = int((tmp_path / "pid").read_text())
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")


def test_a_folder_that_another_process_writes_and_what_a_killed_one_left(folder, tmp_path, capsys):
    code = (
        "import pathlib, sys, time\n"
        "from pangu.new_folder import workplace\n"
        "with workplace(pathlib.Path(sys.argv[1])) as work:\n"
        "    (work / 'model').mkdir()\n"
        "    (work / 'model' / 'half').write_text('half')\n"
        "    (work / 'logits').write_text('half')\n"
        "    time.sleep(60)\n"
    )
    out, hidden = tmp_path / "new", tmp_path / ".new.partial"
    text = ["--calibration", folder / "text", "--tokens", 64, "--window", 32, "--group-size", 16]
    commands = (
        lambda: compress(["quantize", folder / "ours", "--scheme", "W4A16", *text, "--out", out]),
        lambda: convert.main(["export", str(folder / "ours"), "--no-check", "--out", str(out)]),
    )
    for command in commands:
        words = [sys.executable, "-c", code, str(out)]
        with subprocess.Popen(words, cwd=Path(__file__).parents[2]) as other:
            try:
                until((hidden / "logits").exists)
                capsys.readouterr()
                assert command() == 2
            finally:
                other.kill()
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"error: --out={out}: is in use by process {other.pid} on ")
        assert (hidden / "model" / "half").exists()
        assert command() == 0
        assert [path.name for path in tmp_path.iterdir()] == ["new"]
        assert not (out / "half").exists()
        shutil.rmtree(out)
    hidden.mkdir()
    (hidden / "mine").write_text("no model's")
    assert command() == 2
    assert f"{hidden} is in the way, which is none of ours" in capsys.readouterr().err
    assert (hidden / "mine").exists()


def test_the_model_writes_its_own_calibration_text(folder, tmp_path, capsys):
    words = ["quantize", folder / "ours", "--scheme", "W4A16", "--method", "gptq"]
    words += ["--calibration", "self", "--tokens", 128, "--window", 32, "--out"]
    assert compress([*words, tmp_path / "one"]) == 0
    assert "(perplexity on self)" in capsys.readouterr().out
    assert compress([*words, tmp_path / "two"]) == 0
    one, two = Safetensors(tmp_path / "one"), Safetensors(tmp_path / "two")
    assert all((one.read(name) == two.read(name)).all() for name in one.names())
