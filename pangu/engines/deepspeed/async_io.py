"""DeepSpeed's operator that reads and writes files behind its back (`async_io`), for
`engine.offload=nvme`: built once, into a folder of our own, and loaded from there.

DeepSpeed would build it in the first run that needs it: for minutes, each rank waiting for the
first, and for ever where a killed build has left its lock. Nothing here imports torch before it
builds or loads.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from platform import machine
from types import ModuleType

from configs.violation import ConfigError
from pangu.run_lock import hold

PARTS = ("pin_memory", "async_io")  # the second needs symbols of the first
LIBRARY = "libaio, with its headers (Debian: apt-get install libaio-dev)"
# Nearly all of the time of each of its fifteen files goes into torch's headers and into what a
# debugger would want. In the place of <torch/extension.h>, what they use of it: less than half.
HEADER = """\
#pragma once
#include <torch/types.h>
#include <torch/csrc/utils/pybind.h>
"""
BUILD = """
import os

from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.op_builder.async_io import AsyncIOBuilder as Files
from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder as Pages


def lean(builder):
    folders, flags = builder.include_paths, builder.cxx_args
    headers = os.path.join(os.environ["TORCH_EXTENSIONS_DIR"], "headers")
    builder.include_paths = lambda self: [headers, *folders(self)]
    builder.cxx_args = lambda self: [*flags(self), "-g0"]


lean(Pages)
lean(Files)
AsyncIOBuilder().load(verbose=True)
"""


class NotBuilt(Exception):
    """Why there is no operator; a sentence."""


def folder(backend: str) -> Path:
    """Where the operator of this DeepSpeed, torch, Python and kind of machine is."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    made_of = [f"deepspeed-{version('deepspeed')}", f"torch-{version('torch')}", backend]
    kind = sysconfig.get_config_var("SOABI") or f"{sys.implementation.cache_tag}-{machine()}"
    return Path(cache) / "pangu" / "-".join([*made_of, kind])


def file(part: str, backend: str) -> Path:
    return folder(backend) / part / f"{part}.so"


def is_built(backend: str) -> bool:
    return all(file(part, backend).is_file() for part in PARTS)


def lacking() -> str:
    """What a build needs and this machine has not; "" where it has all."""
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        return f"a C++ compiler ({compiler})"
    if not shutil.which("ninja", path=_path()):
        return "ninja (pip install ninja)"
    reads = [compiler, "-E", "-x", "c++", "-"]
    said = subprocess.run(reads, input="#include <libaio.h>", text=True, capture_output=True)
    return LIBRARY if said.returncode else ""


def _path() -> str:
    """Where programs are looked for: beside this interpreter too, where pip puts ninja."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def build(backend: str, minutes: float) -> Path:
    """The folder, with the operator in it. What a build that was ended has done is kept for the
    next one; torch's lock is not.

    Raises:
        NotBuilt: something is missing, another process builds, time is over, or it went wrong.
    """
    if is_built(backend):
        return folder(backend)
    if missing := lacking():
        raise NotBuilt(f"it takes {missing}, which is not here")
    whole = folder(backend)
    begun = whole.with_name(f"{whole.name}.begun")
    try:
        with hold(whole.parent, f"{whole.name}.lock") as lock:
            if is_built(backend):
                return whole
            begun.mkdir(exist_ok=True)
            for left in begun.glob("*/lock"):  # of a build that is no more, since ours is held
                left.unlink()
            _compile(begun, backend, minutes, lock)
            shutil.rmtree(whole, ignore_errors=True)  # of which a file is gone
            begun.rename(whole)
    except ConfigError as error:
        said = error.violations[0]
        raise NotBuilt(f"{said.value} {said.reason}") from None
    return whole


def _compile(place: Path, backend: str, minutes: float, lock: int) -> None:
    environ = {**os.environ, "PATH": _path(), "DS_ACCELERATOR": backend}
    environ["TORCH_EXTENSIONS_DIR"] = str(place)
    header = place / "headers" / "torch" / "extension.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists():  # ninja goes by its time
        header.write_text(HEADER)
    log = place / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", BUILD],
            env=environ,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],  # it goes on where this process is killed, and nobody beside it
        )
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            over = f"{minutes:g} minutes are over; the next call goes on from there"
            raise NotBuilt(over) from None
        finally:
            if process.poll() is None:  # time is over, or this process was told to end
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code or not all((place / part / f"{part}.so").is_file() for part in PARTS):
        lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
        raise NotBuilt(f"it went wrong ({lines[-1].strip()}); all that was said: {log}")


def load(backend: str) -> None:
    """Give DeepSpeed's builders what has been built, so that they build nothing."""
    from deepspeed.ops.op_builder import builder, pin_memory_load

    for part in PARTS:
        module = _import(part, file(part, backend))
        ctypes.CDLL(str(file(part, backend)), mode=ctypes.RTLD_GLOBAL)
        builder.OpBuilder._loaded_ops[part] = module
        if part == PARTS[0]:
            setattr(sys, pin_memory_load._SYS_CACHE_ATTR, module)


def _import(name: str, path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
