"""The preflight command, as a user runs it and by its figures."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from configs.compose import load
from configs.violation import Violation
from pangu import machine_check, preflight
from pangu.data import files
from pangu.violation_table import table
from simulator.api import pipeline_ranks
from simulator.parameters import count_parameters

ROOT = Path(__file__).parents[2]


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pangu.doctor", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_ten_thousand_ranks() -> None:
    result = doctor(
        "model=pangu_ultra_moe",
        "parallel=pangu_ultra",
        "devices=10240",
        "train.global_batch_size=1280",
        "train.seq_length=4096",
        "hardware=ascend_910b_280t",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(r"expert \(EP\) +│ 32 +│ 320 +│ 0, 1, 2, … 31", result.stdout)
    assert re.search(r"pipeline \(PP\) +│ 16 +│ 640 +│ 0, 640, 1280, … 9600", result.stdout)
    assert re.search(r"tensor \(TP\).*one node", result.stdout)
    assert "HCCL_CONNECT_TIMEOUT" in result.stdout
    assert "719.09 B parameters, 40.37 B active" in result.stdout
    assert "(717.91 B and 39.19 B with one vocabulary table)" in result.stdout
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE), "torch was imported"


def test_violations_end_with_2_and_show_the_rest() -> None:
    result = doctor("experiment=quickstart", "train.global_batch_size=7", "moe.topk=1")
    assert result.returncode == 2
    assert "did you mean top_k" in result.stderr
    assert "train.global_batch_size" in result.stderr
    assert "Traceback" not in result.stderr
    assert "expert (EP)" in result.stdout
    broken = doctor("parallel.pipeline_model_parallel_size=0")
    assert broken.returncode == 2
    assert "at least 1" in broken.stderr


def test_files_that_are_not_here(tmp_path: Path) -> None:
    """They keep a run on this machine from starting, and a planned one is told of them."""
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train.idx").touch()
    blend = f"data.blend={{{tmp_path}/half: 0.5, {tmp_path}/none: 0.5}}"
    result = doctor("data=indexed", blend, f"data.tokenizer={tmp_path}/t.json")
    assert result.returncode == 2
    absent = [f"{tmp_path}/half/train.bin", f"{tmp_path}/none.bin", f"{tmp_path}/none.idx"]
    assert result.stderr.count("│ data.blend ") == 3
    assert result.stderr.count("│ data.tokenizer ") == 1
    assert "moge_tiny: 2.11 M parameters" in result.stdout, "what is intact is shown"
    (tmp_path / "code.bin").touch()
    named = load(["data=indexed", f"data.blend={{{tmp_path}/code.bin: 1}}"])
    assert [v.suggestion for v in files.faults(named)] == [f"without .bin: {tmp_path}/code"] * 2
    planned = doctor("data=indexed", blend, "devices=8", "data.tokenizer=t.json")
    assert planned.returncode == 0, planned.stderr
    warnings = "".join(planned.stderr.split())
    for path in absent:
        assert f":thereisnofile{path}(afolderthat" in warnings
    assert "warning:data.tokenizer=t.json:thereisnotokenizerfilet.json" in warnings


def test_what_would_work_can_be_copied() -> None:
    """In a file, 120 columns wide, no suggested key is broken in two."""
    key = "parallel.virtual_pipeline_model_parallel_size"
    violation = Violation("train.global_batch_size", 1000, "a reason " * 9, f"{key}=1; or {key}=3")
    out = Console(width=120, file=io.StringIO(), record=True)
    out.print(table([violation, violation], "to mend", out.width))
    text = out.export_text()
    assert text.count(f"{key}=1;") == text.count(f"{key}=3") == 2
    assert {len(line.rstrip()) for line in text.splitlines()[1:]} == {120}


@pytest.mark.parametrize("model", ["moge_tiny", "pangu_pro_moe", "pangu_ultra_moe", "mixtral_8x7b"])
def test_parameters_per_rank_add_up(model: str) -> None:
    """With experts and stages spread, and nothing else, ranks add up to the whole model."""
    layout = "parallel.pipeline_model_parallel_size=2"
    noop = "parallel.num_noop_layers=1" if model == "pangu_ultra_moe" else "seed=1"
    config = load([f"model={model}", layout, noop, "devices=8", EP4, "backend.precision=fp32"])
    ranks = pipeline_ranks(config)
    count = count_parameters(config)
    # The last stage has an embedding of its own, as its head or for multi-token prediction.
    second = config.model.tie_embeddings or config.model.mtp_num_layers
    copy = config.model.vocab_size * config.model.hidden_size if second else 0
    total = sum(float(r.parameters.dense + 4 * r.parameters.experts) for r in ranks)
    assert total == count.allocated + copy
    element = 4 * sum(float(rank.parameters.total) for rank in ranks)
    assert sum(float(rank.memory.weights) for rank in ranks) == element


EP4 = "parallel.expert_model_parallel_size=4"


def test_torch_npu_without_cann(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cpu", "torch-npu": "2.12.0", "megatron-core": "0.16.1"}
    found = {name: installed.get(name) for name in machine_check.PACKAGES}
    monkeypatch.setattr(machine_check, "packages", lambda: found)
    said = " ".join(machine_check.complaints("npu"))
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in said
    assert "torch-npu 2.12.0 needs torch of the same version, not 2.13.0+cpu" in said
    found["megatron-core"] = None
    assert "megatron-core missing" in " ".join(machine_check.impossible("auto"))
    assert machine_check.backend("auto")[0] == "cpu"


def test_an_apex_of_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is in it: the name is on the package index, and is not NVIDIA's."""
    optimizers = tmp_path / "apex" / "optimizers" / "__init__.py"
    optimizers.parent.mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    (said,) = machine_check.another_apex()
    assert str(tmp_path) in said
    assert "pip uninstall apex" in said
    optimizers.write_text("from .fused_adam import FusedAdam\n")
    assert machine_check.another_apex() == []
    assert "apex" not in sys.modules


def test_locks_that_killed_builds_left(tmp_path: Path) -> None:
    folder = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert machine_check.held_locks(folder) == []
    locks = [tmp_path / "cpu_adam" / "lock", tmp_path / "py311_cpu" / "shm_comm" / "lock"]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (0, time.time() - 600))
    said = machine_check.held_locks(folder)
    assert len(said) == 2
    for sentence, lock in zip(said, locks, strict=True):
        assert sentence.startswith(f"every run that needs the extension {lock.parent.name} waits")
        assert sentence.endswith(f"10 minutes ago: if nothing builds it now, rm {lock}")


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(["engine=deepspeed", "data=synthetic"])
    assert machine_check.unusable_deepspeed() == ""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = f"deepspeed=={machine_check.DEEPSPEED}"
    assert pinned in project["optional-dependencies"]["deepspeed"]
    installed: dict[str, str | None] = dict.fromkeys(machine_check.PACKAGES)
    monkeypatch.setattr(machine_check, "packages", lambda: installed)
    assert "it is not installed" in [
        violation.reason for violation in preflight.faults_here(config)
    ]
    installed["deepspeed"] = "0.20.0"
    found = preflight.faults_here(config)
    (engine,) = [violation for violation in found if violation.key == "engine.name"]
    assert engine.reason == f"0.20.0 is installed, and it takes {machine_check.DEEPSPEED}"
    assert "pip install 'pangu-moe[deepspeed]'; or engine.name=megatron" in engine.suggestion


def test_variables_are_filled_in() -> None:
    rows = {
        variable.name: (variable, value)
        for variable, value in machine_check.variables(
            {"HCCL_BUFFSIZE": "100"}, timeout_minutes=30, groups=5
        )
    }
    assert rows["HCCL_EXEC_TIMEOUT"][0].recommended == "1800"
    assert "500 MB" in rows["HCCL_BUFFSIZE"][0].why
    assert rows["HCCL_BUFFSIZE"][1] == "100"


def test_a_device_that_is_not_here_is_one_sentence() -> None:
    result = doctor("backend=npu", "--device-check")
    assert result.returncode == 2
    assert "backend=npu: torch-npu" in result.stderr
    assert "Traceback" not in result.stderr
    assert doctor("train.foo=1", "--device-check").returncode == 2
