"""Seconds of the counts on a machine: what each block costs forward and backward, what of its
communication is exposed, and which line of the bill it stands on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from simulator.array import Array
from simulator.collectives import collective_seconds
from simulator.counts.layer import Blocks
from simulator.counts.records import Counts, Message, Modules, Operator, Shapes, total
from simulator.hardware import Hardware
from simulator.host import issue_seconds
from simulator.layer_overlap import inside_layer
from simulator.layout import Layout
from simulator.operators import (
    attention_seconds,
    grouped_matmul_seconds,
    matmul_seconds,
    vector_seconds,
)

EXPERT_GROUPS = ("ep", "etp", "expert")  # over which tokens go to experts and back
PASSES = ("forward", "input_gradient", "weight_gradient")
# Forward lines whose results no backward pass reads: the end of a dense layer.
LAST = ("mlp.fc2", "mlp.fc2 output", "mlp.residual")
_TIMING: dict[str, Callable[..., Array]] = {
    "matmul": matmul_seconds,
    "grouped_matmul": grouped_matmul_seconds,
    "attention": attention_seconds,
    "vector": vector_seconds,
}


@dataclass(frozen=True)
class Line:
    """One line of the bill: an operator or message of one micro-batch."""

    name: str
    phase: str
    kind: str
    seconds: Array
    exposed: Array  # part of a message that no operator hides; all of an operator
    flops: Array = 0
    bytes: Array = 0
    group: str = ""
    repeated: Array = 0  # 1 where selective recomputation runs it a second time


@dataclass(frozen=True)
class BlockSeconds:
    """Seconds of one block for one micro-batch on the device, exposed communication included.

    `host_forward` and `host_backward` are what the host takes to issue it meanwhile
    (`simulator.host`). `experts_forward` and `experts_backward` are the exposed seconds of expert
    dispatch and combine, which the overlapped schedule can hide behind the other direction's
    computing; `experts_hidden` are those, of both passes, that the layer hides by itself
    (`simulator.layer_overlap`).
    """

    forward: Array = 0.0
    again: Array = 0.0  # what recomputing the whole block repeats of `forward`
    input_gradient: Array = 0.0
    weight_gradient: Array = 0.0
    experts_forward: Array = 0.0
    experts_backward: Array = 0.0
    experts_hidden: Array = 0.0
    # Forward seconds that selective recomputation of a module, or of any of several, repeats.
    repeatable: dict[Modules, Array] = field(default_factory=dict)
    host_forward: Array = 0.0
    host_backward: Array = 0.0
    host_repeatable: dict[Modules, Array] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    def recompute(self, layout: Layout) -> Array:
        """Seconds of selective recomputation; whole layers repeat `again` instead."""
        return _repeated(layout, self.repeatable)

    def host_recompute(self, layout: Layout) -> Array:
        """What the host takes to issue that."""
        return _repeated(layout, self.host_repeatable)

    def backward(self, layout: Layout) -> Array:
        return self.input_gradient + self.weight_gradient + self.recompute(layout)


def operator_seconds(hw: Hardware, operator: Operator) -> Array:
    """Seconds of one operator, its launch included."""
    shape = operator.shape
    if operator.kind in ("matmul", "grouped_matmul", "attention") and "dtype" in shape:
        shape = shape | {"dtype": _computed_in(hw, shape["dtype"])}
    return _TIMING[operator.kind](hw, **shape) * operator.count


def _computed_in(hw: Hardware, dtype: str) -> str:
    """float32 products run on matrix units at a lower rate where the machine states one."""
    return "bf16" if dtype == "fp32" and "fp32" not in hw.peak_tflops else dtype


def message_seconds(hw: Hardware, s: Shapes, message: Message) -> Array:
    """Seconds of one collective over its group's placement."""
    layout = s.layout
    size = layout.size(message.group) if message.ranks is None else message.ranks
    stride = layout.stride(message.group) if message.stride is None else message.stride
    seconds = collective_seconds(hw, message.kind, message.bytes, size, stride)
    return seconds * message.count


class _Sums:
    """What the operators and messages of a block add up to."""

    def __init__(self) -> None:
        self.passes: dict[str, Array] = dict.fromkeys(PASSES, 0.0)
        self.experts: dict[str, Array] = dict.fromkeys(PASSES, 0.0)
        self.inside: Array = 0.0
        self.repeatable: dict[Modules, Array] = {}
        self.lines: list[Line] = []

    def add(self, line: Line, modules: Modules, *, inside: Array | None = None) -> None:
        """One line; selective recomputation of `modules` repeats it. Of a message of experts,
        `inside` is what its layer hides, each time."""
        self.lines.append(line)
        self.passes[line.phase] = self.passes[line.phase] + line.exposed
        again = line.seconds if inside is None else line.seconds - inside
        if modules:
            self.repeatable[modules] = self.repeatable.get(modules, 0.0) + again
        if inside is not None:
            self.experts[line.phase] = self.experts[line.phase] + line.exposed
            self.inside = self.inside + inside


def block_seconds(hw: Hardware, s: Shapes, counts: Counts) -> BlockSeconds:
    """Price a block. Messages beside an operator show only what outlasts it."""
    sums = _Sums()
    unshared: dict[str, Array] = {}  # seconds of each line beside which nothing runs yet
    for operator in counts.operators:
        seconds = _in_block(s, operator, operator_seconds(hw, operator))
        unshared[f"{operator.name}:{operator.phase}"] = seconds
        line = Line(
            operator.name,
            operator.phase,
            operator.kind,
            seconds,
            seconds,
            operator.flops * operator.count,
            operator.bytes * operator.count,
            repeated=_again(s.layout, operator.recompute),
        )
        sums.add(line, operator.recompute)
    priced, shown = [], []
    for message in counts.messages:
        seconds = message_seconds(hw, s, message)
        shown.append(seconds - _hide(hw, message, seconds, unshared))
        unshared[f"{message.name}:{message.phase}"] = seconds
        priced.append((message, seconds))
    free = {name: unshared[name] for name in (f"{o.name}:{o.phase}" for o in counts.operators)}
    within = inside_layer(hw, s, priced, free)
    for (message, seconds), exposed, inside in zip(priced, shown, within, strict=True):
        line = Line(
            message.name,
            message.phase,
            message.kind,
            seconds,
            exposed - inside,
            bytes=message.bytes * message.count,
            group=message.group,
            repeated=_again(s.layout, message.recompute),
        )
        of_experts = message.group in EXPERT_GROUPS
        sums.add(line, message.recompute, inside=inside if of_experts else None)
    issued = issue_seconds(hw, s, counts)
    end = total(
        each.exposed for each in sums.lines if each.phase == "forward" and each.name in LAST
    )
    return BlockSeconds(
        sums.passes["forward"],
        sums.passes["forward"] - (end if s.traits.recompute_stops_early else 0.0),
        sums.passes["input_gradient"],
        sums.passes["weight_gradient"],
        sums.experts["forward"],
        sums.experts["input_gradient"],
        sums.inside,
        sums.repeatable,
        issued.forward,
        issued.backward,
        issued.repeatable,
        sums.lines,
    )


def _in_block(s: Shapes, operator: Operator, seconds: Array) -> Array:
    """What the engine's habits make of an operator's seconds."""
    if operator.kind == "vector":
        seconds = seconds * s.vector_passes
    if operator.kind == "attention":
        seconds = seconds * s.traits.attention_span
        if not s.traits.balanced_context:
            seconds = seconds * np.where(s.layout.ring, 2.0 - 1.0 / s.layout.cp, 1.0)
    return seconds


def _hide(hw: Hardware, message: Message, seconds: Array, unshared: dict[str, Array]) -> Array:
    """Seconds of a message that the operator beside it covers, and does not cover another time."""
    if message.beside not in unshared:
        return 0.0
    fused = message.group == "tp" and message.beside.endswith(f":{message.phase}")
    share = hw.overlap.fused if fused else hw.overlap.independent
    hidden = np.minimum(seconds * share, unshared[message.beside])
    unshared[message.beside] = unshared[message.beside] - hidden
    return hidden


def _repeated(layout: Layout, seconds: dict[Modules, Array]) -> Array:
    result: Array = 0.0
    for modules, each in seconds.items():
        result = result + _again(layout, modules) * each
    return result


def _again(layout: Layout, modules: Modules) -> Array:
    """1 where selective recomputation of one of `modules` is on."""
    if not modules:
        return 0.0
    on: Array = False
    for module in (modules,) if isinstance(modules, str) else modules:
        on = np.logical_or(on, layout.drops(module))
    return np.where(np.logical_and(on, np.logical_not(layout.swap)), 1.0, 0.0)


@dataclass(frozen=True)
class StageBlocks:
    """Seconds of every building block."""

    dense: BlockSeconds
    moe: BlockSeconds
    embedding: BlockSeconds
    mtp: BlockSeconds
    head: BlockSeconds
    patch: BlockSeconds


def price_blocks(hw: Hardware, s: Shapes, blocks: Blocks) -> StageBlocks:
    nothing = BlockSeconds()
    return StageBlocks(
        block_seconds(hw, s, blocks.dense) if blocks.dense else nothing,
        block_seconds(hw, s, blocks.moe) if blocks.moe else nothing,
        block_seconds(hw, s, blocks.embedding),
        block_seconds(hw, s, blocks.mtp) if blocks.mtp else nothing,
        block_seconds(hw, s, blocks.head),
        block_seconds(hw, s, blocks.patch) if blocks.patch else nothing,
    )
