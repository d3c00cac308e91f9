"""Libraries in the place of CANN's, so that torch-npu imports and finds devices without an NPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / ".torch-npu"
NAMES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
CANN_SYMBOL = ("acl", "rt", "Hccl", "hccl", "Msprof")


def missing() -> list[str]:
    """What is needed and not there."""
    tools = [name for name in ("cc", "g++", "nm") if not shutil.which(name)]
    package = [] if (PACKAGE / "torch_npu").is_dir() else ["torch-npu in .torch-npu"]
    return tools + package


def symbols(kind: list[str], *files: Path) -> set[str]:
    """Names that `files` define or want."""
    listing = subprocess.run(["nm", *kind, *files], check=True, capture_output=True, text=True)
    lines = [line.split() for line in listing.stdout.splitlines()]
    return {words[-1] for words in lines if len(words) > 1 and words[-2] in "UT"}


def build(folder: Path) -> None:
    """One library with all that torch-npu wants from CANN, under every name it looks for."""
    headers = PACKAGE / "torch_npu/include"
    paths = [headers, headers / "third_party/acl/inc", headers / "third_party/hccl/inc"]
    include = [f"-I{path}" for path in paths]
    objects = []
    for compiler, source in (("cc", "acl.c"), ("g++", "hccl.cpp"), ("g++", "late.cpp")):
        made = folder / f"{source}.o"
        command = [compiler, "-w", "-O2", "-fPIC", "-c", *include, "-o", made, HERE / source]
        subprocess.run(command, check=True)
        objects.append(made)
    wanted = symbols(["-D", "--undefined-only"], *(PACKAGE / "torch_npu/lib").glob("*.so"))
    rest = {name for name in wanted if name.startswith(CANN_SYMBOL) and "@" not in name}
    rest -= symbols(["--defined-only"], *objects)
    source = "\n".join(f"int {name}(void) {{ return 0; }}" for name in sorted(rest))
    command = ["cc", "-c", "-fPIC", "-x", "c", "-", "-o", folder / "rest.o"]
    subprocess.run(command, input=source, text=True, check=True)
    library = folder / "libascendcl.so"
    subprocess.run(["g++", "-shared", *objects, folder / "rest.o", "-o", library], check=True)
    for name in NAMES:
        (folder / f"lib{name}.so").symlink_to(library.name)


def environment(libraries: Path) -> dict[str, str]:
    """Of a process that imports torch-npu beside the `libraries` that `build` has made."""
    path = [str(libraries), str(Path(torch.__file__).parent / "lib")]
    return os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(PACKAGE)]),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        # Launches are not queued for a thread of their own: the host reads what they have written.
        "TASK_QUEUE_ENABLE": "0",
        "PYTORCH_NO_NPU_MEMORY_CACHING": "1",  # what is freed is given back, see acl.c
    }
