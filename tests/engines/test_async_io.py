"""Building DeepSpeed's operator for drives: what is said without one, and that a build leaves
nothing that a run would wait for. A stand-in is compiled here, the real one by hand, for
`python -m tests.drills.nvme`."""

import contextlib
import os
import time
from pathlib import Path

import pytest

from configs.compose import load
from pangu import build_nvme, preflight
from pangu.engines.deepspeed import async_io
from pangu.run_lock import hold

NVME = ["engine=deepspeed", "parallel.zero_stage=3", "engine.offload=nvme", "backend=cpu"]
WRITES = """
import os, pathlib, sys
for part in ("pin_memory", "async_io"):
    place = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / part
    assert not (place / "lock").exists(), "a lock that the real one would wait for"
    place.mkdir(exist_ok=True)
    (place / f"{part}.so").touch()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, and a compiler that finds every header."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "true")
    ninja = tmp_path / "ninja"
    ninja.touch(mode=0o755)
    monkeypatch.setattr(async_io, "_path", lambda: f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "cache"


def refusal(tmp_path: Path) -> str:
    (found,) = preflight.no_nvme(load([*NVME, f"engine.nvme_path={tmp_path}"]))
    return str(found)


def test_a_run_without_it_is_refused_with_what_to_do(tmp_path, monkeypatch):
    assert "python -m pangu.build_nvme --backend cpu" in refusal(tmp_path)
    assert "apt-get" not in refusal(tmp_path)
    monkeypatch.setenv("CXX", "false")
    assert "apt-get install libaio-dev" in refusal(tmp_path)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert "a C++ compiler" in refusal(tmp_path)


def test_a_build_that_was_killed_leaves_no_lock_to_wait_for(cache, monkeypatch):
    begun = async_io.folder("cpu").with_name(f"{async_io.folder('cpu').name}.begun")
    (begun / "async_io").mkdir(parents=True)
    (begun / "async_io" / "lock").touch()
    (begun / "async_io" / "first.o").touch()
    monkeypatch.setattr(async_io, "BUILD", WRITES)
    assert async_io.build("cpu", 1) == async_io.folder("cpu")
    assert async_io.is_built("cpu")
    assert (async_io.folder("cpu") / "async_io" / "first.o").exists(), "it went on from there"
    assert not begun.exists()


def test_a_build_ends_in_time_and_with_all_its_processes(cache, monkeypatch, capsys):
    monkeypatch.setattr(
        async_io, "BUILD", "import subprocess; subprocess.run(['sleep', '61.7123'])"
    )
    began = time.monotonic()
    assert build_nvme.main(["--minutes", "0.02", "--backend", "cpu"]) == 2
    assert time.monotonic() - began < 30
    said = capsys.readouterr().err
    assert "the next call goes on from there" in said
    assert "\n" not in said.strip()
    while is_running("61.7123"):  # killed, and not yet gone
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    assert not async_io.is_built("cpu")


def is_running(word: str) -> bool:
    """Whether a process of this machine has a word in its command."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if word in file.read_text(errors="replace").split("\0"):
                return True
    return False


def test_what_went_wrong_and_who_builds_are_said(cache, monkeypatch):
    monkeypatch.setattr(async_io, "BUILD", "raise SystemExit('io_submit is not there')")
    with pytest.raises(async_io.NotBuilt, match="io_submit is not there"):
        async_io.build("cpu", 1)
    place, name = async_io.folder("cpu").parent, f"{async_io.folder('cpu').name}.lock"
    with (
        hold(place, name),
        pytest.raises(async_io.NotBuilt, match=f"{place} is in use by process {os.getpid()} on "),
    ):
        async_io.build("cpu", 1)
