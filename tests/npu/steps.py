"""Ranks of `test_npu_steps`, on NPUs whose memory is the host's: the doctor's check of every
operator, then steps of several layouts.

python -m torch.distributed.run … -m tests.npu.steps LAYOUTS.json RESULTS.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401 - registers the device
from layouts import all_layouts

from pangu import backends
from pangu.backends import turns
from pangu.backends.host_tier import PinnedTier
from pangu.engines.megatron.fitting import select_backend
from pangu.ops.cases import TOLERANCES, cases, compared
from tests.npu import operators
from tests.npu.host_memory import HostMemory, without_kernel


def main(layouts: Path, results: Path) -> None:
    sent: list[int] = []  # bytes on their way to pinned memory
    send = PinnedTier.send
    PinnedTier.send = lambda self, source: (sent.append(source.numel()), send(self, source))[1]
    backwards: list[bool] = []  # of turns that changed beside another pass, in which
    hand_over = turns.hand_over

    def handed_over() -> None:
        if turns._thread.own is not None:
            backwards.append(torch._C._current_graph_task_id() != -1)
        hand_over()

    turns.hand_over = handed_over
    with HostMemory() as mode:
        select_backend("npu", int(os.environ["LOCAL_RANK"]), "fp32")
        dist.init_process_group("hccl")
        outcomes = [compared(case, dtype) for case in cases() for dtype in TOLERANCES]
        wrong = [str(outcome) for outcome in outcomes if not outcome.holds]
        given = json.loads(layouts.read_text())
        found = all_layouts(given["layouts"], dist.get_world_size(), given["steps"])
        if dist.get_rank() == 0:
            called = sorted(name for name in mode.called if name.startswith(("npu.", "c10d.")))
            said = {"wrong": wrong, "steps": found, "called": called, "swapped": sum(sent)}
            said["without kernel"] = without_kernel(mode.called)
            said["attention"] = sorted(operators.LAYOUTS)
            said["sensors"] = backends.current().sensors()
            said["handed over"] = backwards.count(True), backwards.count(False)
            results.write_text(json.dumps(said))
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
