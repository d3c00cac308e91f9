"""What this machine has to offer, found without importing torch (which may be what fails)."""

from __future__ import annotations

import ctypes.util
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PACKAGES = (
    "torch",
    "torch-npu",
    "triton",
    "megatron-core",
    "deepspeed",
    "transformer-engine",
    "apex",
    "numpy",
    "hydra-core",
    "transformers",
    "mindspore",
)
REQUIRED = ("torch", "megatron-core")
DEEPSPEED = "0.19.8"  # of which `pangu/engines/deepspeed` reads the optimizers' tensors

NO_CANN = (
    "torch-npu is installed but CANN's libraries are not: `import torch` fails. Source CANN's "
    "set_env.sh, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 (pangu.train sets it itself)."
)


def packages() -> dict[str, str | None]:
    """Installed versions; None where a package is missing."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def has_cann() -> bool:
    """Whether the loader would find CANN's collective library."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return bool(ctypes.util.find_library("hccl")) or any(
        folder and (Path(folder) / "libhccl.so").exists() for folder in folders
    )


def devices(pattern: str) -> int:
    """Device files of a driver, e.g. `davinci[0-9]*`."""
    return len(list(Path("/dev").glob(pattern)))


def backend(requested: str) -> tuple[str, str]:
    """The backend that a run would take, and why."""
    if requested != "auto":
        return requested, "as asked for"
    found = packages()
    if found["torch-npu"] and has_cann() and (count := devices("davinci[0-9]*")):
        return "npu", f"torch-npu, CANN and {count} NPUs are here"
    torch = found["torch"] or ""
    if (count := devices("nvidia[0-9]*")) and "+cpu" not in torch:
        return "cuda", f"{count} GPUs are here"
    return "cpu", "no NPU with torch-npu and CANN, no GPU with a CUDA build of torch"


def complaints(requested: str) -> list[str]:
    """What is wrong with the installation, one sentence each, with what to do."""
    found = packages()
    said: list[str] = []
    torch, npu = found["torch"], found["torch-npu"]
    if npu and not has_cann():
        said.append(NO_CANN)
    if npu and torch and npu.split(".post")[0].split("+")[0] != torch.split("+")[0]:
        said.append(f"torch-npu {npu} needs torch of the same version, not {torch}")
    return [*said, *another_apex(), *held_locks(os.environ), *impossible(requested)]


def unusable_deepspeed() -> str:
    """Why `engine=deepspeed` cannot run with what is installed; "" where it can."""
    found = packages()["deepspeed"]
    if found is None:
        return "it is not installed"
    return "" if found == DEEPSPEED else f"{found} is installed, and it takes {DEEPSPEED}"


def another_apex() -> list[str]:
    """The package index has an `apex` that is another project. NVIDIA's and Ascend's are told by
    their optimizers; megatron-core asks for these, and takes torch's where there are none."""
    found = find_spec("apex")
    if found is None:
        return []
    folders = [Path(place) for place in found.submodule_search_locations or ()]
    optimizers = [folder / "optimizers" / "__init__.py" for folder in folders]
    if any("FusedAdam" in file.read_text() for file in optimizers if file.is_file()):
        return []
    where = found.origin or ", ".join(map(str, folders))
    return [
        f"apex ({where}) is not NVIDIA's or Ascend's: it has no FusedAdam, and is not used. pip "
        "uninstall apex; theirs are built from source"
    ]


def held_locks(environ: Mapping[str, str]) -> list[str]:
    """Locks that builds of torch's C++ extensions (DeepSpeed's too) have taken. Whoever is killed
    leaves one, and every later build of that extension waits for it without a word."""
    folder = Path(environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    said = []
    for lock in sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]):
        try:
            minutes = (time.time() - lock.stat().st_mtime) / 60
        except OSError:  # given back meanwhile
            continue
        said.append(
            f"every run that needs the extension {lock.parent.name} waits for {lock}, taken "
            f"{minutes:.0f} minutes ago: if nothing builds it now, rm {lock}"
        )
    return said


def impossible(requested: str) -> list[str]:
    """Why a run on this backend cannot start with what is installed."""
    found = packages()
    torch = found["torch"] or ""
    if missing := [name for name in REQUIRED if not found[name]]:
        return [f"{' and '.join(missing)} missing: pip install 'pangu-moe[train]', or make install"]
    if requested == "npu" and not found["torch-npu"]:
        return ["backend=npu needs torch-npu: pip install 'pangu-moe[train,npu]'"]
    if requested == "cuda" and "+cpu" in torch:
        return [f"backend=cuda needs a CUDA build of torch, not {torch}"]
    return []


@dataclass(frozen=True)
class Variable:
    """An environment variable of Ascend's stack, with the value that we start from."""

    name: str
    recommended: str
    why: str


VARIABLES = (
    Variable(
        "HCCL_CONNECT_TIMEOUT", "1200", "seconds to meet; 120 by default, short for many ranks"
    ),
    Variable("HCCL_EXEC_TIMEOUT", "{timeout}", "seconds of one collective; launch.timeout_minutes"),
    Variable("HCCL_BUFFSIZE", "200", "MB per process group and device; this layout: {buffers} MB"),
    Variable("HCCL_WHITELIST_DISABLE", "1", "no list of allowed hosts to keep"),
    Variable("HCCL_SOCKET_IFNAME", "", "the network card between nodes, where there are several"),
    Variable("ASCEND_RT_VISIBLE_DEVICES", "", "a subset of the node's NPUs"),
    Variable("TASK_QUEUE_ENABLE", "2", "kernels are queued by a thread of their own"),
    Variable("CPU_AFFINITY_CONF", "1", "processes are bound to the cores near their NPU"),
    Variable("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", "less fragmented memory"),
    Variable("CUDA_DEVICE_MAX_CONNECTIONS", "1", "order of queued kernels; pangu.train sets it"),
    Variable("NPU_ASD_ENABLE", "1", "detection of silent errors"),
)


def variables(
    environ: Mapping[str, str], *, timeout_minutes: float, groups: int
) -> list[tuple[Variable, str]]:
    """Each variable, filled in for a run, with its present value.

    Args:
        groups: process groups of more than one rank that a device belongs to.
    """
    size = int(environ.get("HCCL_BUFFSIZE", "200"))
    return [
        (
            Variable(
                v.name,
                v.recommended.format(timeout=round(60 * timeout_minutes)),
                v.why.format(buffers=size * groups),
            ),
            environ.get(v.name, ""),
        )
        for v in VARIABLES
    ]


def memory_bytes() -> int:
    """Of this machine, or of the container that this process is in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # none, or "max"
        return physical
    return min(physical, limit)


def machine() -> str:
    """Processor, cores and Python in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cores} cores, Python {platform.python_version()}"
