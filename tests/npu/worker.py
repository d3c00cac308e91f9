"""A rank of `python -m tests.npu`: pangu.train on an NPU whose memory is the host's."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
import torch_npu  # noqa: F401 - registers the device

from pangu.train import main
from tests.npu import operators  # noqa: F401 - registers the kernels
from tests.npu.host_memory import HostMemory, without_kernel


def gather_object(
    obj: Any, object_gather_list: Any = None, dst: int = 0, group: Any = None
) -> None:
    """torch-npu's calls its process group past the dispatcher, where there are no kernels."""
    every = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, obj, group)
    if object_gather_list is not None:
        object_gather_list[:] = every


dist.gather_object = gather_object
with HostMemory() as mode:
    code = main(sys.argv[1:])
used = {name.split(".")[1] for name in mode.called if name.startswith(("npu.", "c10d."))}
print("called:", *sorted(used))
print("without a kernel of torch-npu's:", *(without_kernel(mode.called) or ["none"]))
sys.exit(code)
