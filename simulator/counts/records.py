"""The vocabulary of the counts: operators, messages, tensors kept for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from configs.dispatch import Links, dispatcher, links
from configs.planning import SimulationConfig
from configs.schema import Config, ModelConfig, MoEConfig
from simulator.array import Array
from simulator.hardware import ELEMENT_BYTES
from simulator.layout import Layout
from simulator.parameters import Linear

EAGER_PASSES = 4.0  # of eager code, which runs a fused vector operator as several
Phase = Literal["forward", "input_gradient", "weight_gradient"]
Modules: TypeAlias = str | tuple[str, ...]  # names as in memory.recompute_modules; "" is none
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]


@dataclass(frozen=True)
class Operator:
    """One operator of one micro-batch on one rank.

    `shape` holds the keyword arguments of the timing function of its `kind`
    (`simulator.operators`). `recompute` names the module whose selective recomputation repeats
    a forward operator, or several of which any does. `count` is 0 where a layout has no such
    operator.
    """

    name: str
    phase: Phase
    kind: Literal["matmul", "grouped_matmul", "attention", "vector"]
    flops: Array
    bytes: Array
    shape: dict[str, Any]
    recompute: Modules = ""
    count: Array = 1


@dataclass(frozen=True)
class Message:
    """One collective of one micro-batch on one rank.

    `bytes` follows `simulator.collectives.collective_seconds`: the whole buffer of one rank.
    `beside` names the operator and phase that runs at the same time, "" where nothing does.
    """

    name: str
    phase: Phase
    kind: Collective
    group: str
    bytes: Array
    beside: str = ""
    recompute: Modules = ""
    count: Array = 1
    # Where only some ranks of the group take part: how many, and how far apart.
    ranks: Array | None = None
    stride: Array | None = None


@dataclass(frozen=True)
class Saved:
    """A tensor kept from the forward to the backward pass of a layer, in bytes.

    `dropped_by`: the modules whose selective recomputation makes it again, or whose swap sends it
    to the host; `swapped_by`: those whose swap alone does.
    """

    name: str
    bytes: Array
    dropped_by: tuple[str, ...] = ()
    swapped_by: tuple[str, ...] = ()

    @property
    def movable_by(self) -> tuple[str, ...]:
        """The modules whose swap sends it to the host."""
        return self.dropped_by + self.swapped_by


@dataclass(frozen=True)
class Counts:
    """Everything one layer (or one end of the model) does with one micro-batch."""

    operators: list[Operator] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    # Bytes alive at once beyond the saved tensors at the worst moment of the backward pass.
    backward_peak: Array = 0
    # Elements of each weight matrix on this rank, by name.
    matrices: dict[str, Array] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.operators + other.operators,
            self.messages + other.messages,
            self.saved + other.saved,
            np.maximum(self.backward_peak, other.backward_peak),
            self.matrices | other.matrices,
        )


@dataclass(frozen=True)
class Shapes:
    """What every count starts from: the model, the layout, and the sizes that follow.

    `tokens` are one micro-batch's on one context-parallel rank; `shard` is the part of them that
    a rank holds outside the tensor-parallel matrices (all of them without sequence parallelism).
    """

    model: ModelConfig
    moe: MoEConfig
    traits: SimulationConfig
    layout: Layout
    seq_length: Array
    dtype: str  # of matrix products
    domain: int  # devices that reach each other over the fast links: a node, or a rack
    communicator_bytes: float  # that the collective library keeps for every group
    backend: str = "cuda"  # of the machine
    links: Links = Links()  # noqa: RUF009 - frozen
    moment: float = 4.0  # bytes of each of the optimizer's two moments

    @cached_property
    def dispatchers(self) -> np.ndarray:
        """The name of each layout's dispatcher; a dense model has none.

        Raises:
            ConfigError: the dispatcher named cannot serve one of the layouts.
        """
        ep, of_ep = np.unique(self.layout.ep, return_inverse=True)
        etp, of_etp = np.unique(self.layout.etp, return_inverse=True)
        each = [[dispatcher(self.moe, int(n), int(m), self.links) for m in etp] for n in ep]
        places = (
            np.reshape(of_ep, np.shape(self.layout.ep)),
            np.reshape(of_etp, np.shape(self.layout.etp)),
        )
        names: np.ndarray = np.array(each)[places]
        return names

    @property
    def element(self) -> float:
        """Bytes of an activation: quantised training keeps its activations in 16 bits."""
        return max(ELEMENT_BYTES[self.dtype], 2.0)

    @property
    def linear_element(self) -> float:
        """Bytes of a matrix product's saved input."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def vector_passes(self) -> float:
        """Passes over memory for one of a fused vector operator."""
        return 1.0 if self.traits.fused_kernels else EAGER_PASSES

    @property
    def torch_kernels(self) -> bool:
        """Whether PyTorch's own CUDA kernels run where others have fused ones."""
        return self.traits.torch_kernels and self.backend == "cuda"

    @property
    def tokens(self) -> Array:
        return self.layout.micro_batch * self.seq_length / self.layout.cp

    @property
    def shard(self) -> Array:
        return self.tokens / self.layout.sequence_shards


def shapes(config: Config, layout: Layout) -> Shapes:
    machine = config.hardware or {}
    levels = machine.get("links")
    precision = config.backend.precision
    if precision == "auto":  # the trainer's own choice on each kind of device
        precision = "fp32" if machine.get("backend") == "cpu" else "bf16"
    return Shapes(
        config.model,
        config.moe,
        config.simulation,
        layout,
        config.train.seq_length,
        precision,
        max(machine.get("devices_per_node", 8), levels[0]["devices"] if levels else 0),
        machine.get("communicator_buffer_mb", 200.0) * 1e6,
        machine.get("backend", "cuda"),
        links(config),
        2.0 if config.optimizer.moments_dtype == "bf16" else 4.0,
    )


def matmul(
    s: Shapes, linear: Linear, rows: Array, split: Array, recompute: Modules = "", count: Array = 1
) -> list[Operator]:
    """Forward, input gradient and weight gradient of `linear` over `rows` tokens."""
    inputs, outputs = linear.local_inputs(split), linear.local_outputs(split)
    flops = 2.0 * rows * inputs * outputs
    element = s.linear_element
    read = rows * inputs + inputs * outputs + rows * outputs
    added = s.traits.gradient_accumulation_fusion
    written = 8.0 if added else s.element
    weight = (rows * inputs + rows * outputs) * element + written * inputs * outputs
    operators = []
    for phase, m, n, k in (
        ("forward", rows, outputs, inputs),
        ("input_gradient", rows, inputs, outputs),
        ("weight_gradient", outputs, inputs, rows),
    ):
        last = phase == "weight_gradient"
        operators.append(
            Operator(
                linear.name,
                phase,  # type: ignore[arg-type]
                "matmul",
                flops,
                weight if last else read * element,
                {"m": m, "n": n, "k": k, "dtype": s.dtype, "weight_gradient": last and added},
                recompute if phase == "forward" else "",
                count,
            )
        )
    operators += _added_gradient(s, linear.name, inputs * outputs, count)
    return operators + _quantised(s, linear.name, rows, inputs, outputs, recompute, count)


def _added_gradient(s: Shapes, name: str, elements: Array, count: Array = 1) -> list[Operator]:
    """What adds a weight's gradient to the main gradients where its product does not: in another
    precision it is copied first."""
    if s.traits.gradient_accumulation_fusion:
        return []
    moved = elements * added_bytes(s)
    title = f"{name} gradient added"
    return [Operator(title, "weight_gradient", "vector", 0, moved, {"bytes": moved}, "", count)]


def added_bytes(s: Shapes) -> float:
    """That adding one element of a weight's gradient to the main gradient moves."""
    main = 4.0 if s.traits.fp32_gradients else s.element
    copied = s.element + main if main != s.element else 0.0
    return copied + 3 * main


def _quantised(
    s: Shapes,
    name: str,
    rows: Array,
    inputs: Array,
    outputs: Array,
    recompute: Modules,
    count: Array,
) -> list[Operator]:
    """What a product's operands in fewer than 16 bits cost: its input forward and its output's
    gradient backward, each read once and written twice, plain and transposed."""
    if s.linear_element == s.element:
        return []
    moved = rows * (s.element + 2 * s.linear_element) * s.traits.fp8_cast_passes
    return vector(f"{name} quantised", inputs * moved, outputs * moved, recompute, count)


def grouped_matmul(
    s: Shapes, linear: Linear, experts: Array, rows: Array, split: Array, recompute: Modules = ""
) -> list[Operator]:
    """The same over `experts` matrices, `rows` tokens each, in one launch or one after another."""
    if not s.traits.grouped_experts:
        return matmul(s, linear, rows, split, recompute, experts)
    inputs, outputs = linear.local_inputs(split), linear.local_outputs(split)
    flops = 2.0 * experts * rows * inputs * outputs
    element = s.linear_element
    moved = experts * (rows * inputs + inputs * outputs + rows * outputs) * element
    fused = s.traits.gradient_accumulation_fusion
    written = 8.0 if fused else s.element
    added = experts * (rows * (inputs + outputs) * element + written * inputs * outputs)
    operators = []
    for phase, n, k in (
        ("forward", outputs, inputs),
        ("input_gradient", inputs, outputs),
        ("weight_gradient", outputs, inputs),
    ):
        last = phase == "weight_gradient"
        shape = {"groups": experts, "m_per_group": rows, "n": n, "k": k, "dtype": s.dtype}
        shape |= {"streams": s.traits.expert_streams}
        operators.append(
            Operator(
                linear.name,
                phase,  # type: ignore[arg-type]
                "grouped_matmul",
                flops,
                added if last else moved,
                shape | {"weight_gradient": last, "added": fused},
                recompute if phase == "forward" else "",
            )
        )
    operators += _added_gradient(s, linear.name, experts * inputs * outputs)
    if s.torch_kernels:  # gradients of experts without a row are set to zero
        cleared = 2 * s.element * experts * inputs * outputs
        shape = {"bytes": cleared}
        name = f"{linear.name} gradient cleared"
        operators.append(Operator(name, "weight_gradient", "vector", 0, cleared, shape))
    if s.traits.fused_experts:  # between the two products, casts are theirs
        inputs, outputs = (inputs, 0.0) if linear.split == "column" else (0.0, outputs)
    return operators + _quantised(s, linear.name, experts * rows, inputs, outputs, recompute, 1)


def vector(
    name: str, forward: Array, backward: Array, recompute: Modules = "", count: Array = 1
) -> list[Operator]:
    """An elementwise operator or reduction, given the bytes that it reads and writes."""
    return [
        Operator(name, "forward", "vector", 0, forward, {"bytes": forward}, recompute, count),
        Operator(name, "input_gradient", "vector", 0, backward, {"bytes": backward}, "", count),
    ]


def total(values: Iterable[Array]) -> Array:
    """Sum that stays an array where its terms are."""
    result: Array = 0.0
    for value in values:
        result = result + value
    return result
