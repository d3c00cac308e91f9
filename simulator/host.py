"""What the host takes to issue a block: eager engines call operator after operator, and where that
takes longer than computing, the device waits.

The unit is one call, of an operator or a collective, with its Python, autograd and the launches
of its kernels (`hardware.launch_us.host`). Most operators that the simulator counts are one; those
that it counts as one and engines write as several are listed here. Captured graphs take nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from simulator.array import Array
from simulator.counts.records import EAGER_PASSES, Counts, Modules, Operator, Shapes
from simulator.hardware import Hardware

# Calls forward and backward of an operator in eager code, beside those that it is counted as.
CALLS = {
    "attention.core": (2.0, 2.0),
    "moe.choice": (12.0, 4.0),  # scores, comparison, the balancing terms, counts
    "moe.permute": (10.0, 3.0),  # sorting the choices and their inverse, gathering the rows
    "moe.unpermute": (2.0, 3.0),
    "moe.sort": (4.0, 4.0),
    "moe.unsort": (4.0, 4.0),
}
# Scores, scale and mask with softmax, dropout, weighted sum, and the copies around them.
UNFUSED_ATTENTION = (6.0, 8.0)


@dataclass(frozen=True)
class Issue:
    """Host seconds of one block and micro-batch; `repeatable` as in `BlockSeconds`."""

    forward: Array = 0.0
    backward: Array = 0.0
    repeatable: dict[Modules, Array] = field(default_factory=dict)


def issue_seconds(hw: Hardware, s: Shapes, counts: Counts) -> Issue:
    """What issuing the operators and messages of a block takes."""
    if s.traits.launch == "captured" or not hw.launch_us.host:
        return Issue()
    each = hw.launch_us.host * 1e-6
    forward: Array = 0.0
    backward: Array = 0.0
    repeatable: dict[Modules, Array] = {}
    calls = [(o.phase, o.recompute, _calls(s, o)) for o in counts.operators]
    calls += [
        (m.phase, m.recompute, np.where((s.layout.size(m.group) > 1), m.count, 0))
        for m in counts.messages
    ]
    for phase, recompute, number in calls:
        seconds = number * each
        if phase == "forward":
            forward = forward + seconds
        else:
            backward = backward + seconds
        if recompute:
            repeatable[recompute] = repeatable.get(recompute, 0.0) + seconds
    return Issue(forward, backward, repeatable)


def _calls(s: Shapes, operator: Operator) -> Array:
    at = 0 if operator.phase == "forward" else 1
    once = np.where(np.asarray(operator.bytes) > 0, operator.count, 0)
    if s.torch_kernels and operator.name == "moe.choice":  # counted kernel by kernel
        return once
    if operator.kind == "attention" and not s.traits.fused_attention:
        return UNFUSED_ATTENTION[at] * once
    calls = CALLS.get(operator.name, (1.0, 1.0))[at]
    if operator.kind == "vector" and not s.traits.fused_kernels:
        calls = max(calls, EAGER_PASSES)
    return calls * once
