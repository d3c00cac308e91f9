"""What a machine is: a preset of `configs/hardware`, or a file of the same form that
`pangu.calibrate` measured, as one frozen dataclass.

Figures keep the unit that their name carries in the file; the properties give SI units.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from configs import FOLDER
from configs.limits import (
    Amount,
    Count,
    Efficiency,
    Kept,
    NotNegative,
    Part,
    PartAboveZero,
    Positive,
    Ranks,
    bounded,
)
from configs.violation import ConfigError, Violation

PRESETS = FOLDER / "hardware"

GRADES = {
    "V": "vendor-written file",
    "P": "the system's own paper",
    "M": "measured table",
    "C": "calibrated on published runs that docs/simulator-accuracy.md names",
    "D": "derived from the figures beside it",
    "S": "secondary source",
    "U": "unsourced",
}

ELEMENT_BYTES = {
    "fp64": 8.0,
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "fp4": 0.5,
    "int4": 0.5,
}

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "broadcast"]


@dataclass(frozen=True)
class Link:
    """One level of the interconnect.

    `devices` is how many devices one domain of this level connects (0: any number).
    `bandwidth_gbps` is GB/s, one way, per port; `devices_per_port` devices share a port.
    `mesh`: every device has a link to each of the others, so that a group of g of the n devices
    reaches (g - 1)/(n - 1) of the bandwidth (HCCS inside an Atlas 800 A2 node).
    `latency_us` is per step. `efficiency` is the part of the bandwidth that a collective of each
    kind reaches with large messages (bus bandwidth / link bandwidth), and `half_mib` the message
    at which half of that is reached, by an all-reduce `all_reduce_half_mib` if that is more: its
    pieces go around twice, in step, and between nodes small ones never fill the links.
    """

    name: str
    devices: Amount
    bandwidth_gbps: Positive
    latency_us: NotNegative
    efficiency: dict[Kind, PartAboveZero]
    topology: Literal["switch", "mesh"] = "switch"
    devices_per_port: Count = 1
    half_mib: NotNegative = 0.0
    all_reduce_half_mib: NotNegative = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes/s, one way, per device."""
        return self.bandwidth_gbps * 1e9 / self.devices_per_port


@dataclass(frozen=True)
class Matmul:
    """Efficiency of matrix products.

    `efficiency` at `size` = (m·n·k)^(1/3), interpolated over log(size), is what a product whose
    tiles fill the `units` cores exactly reaches of the peak. `tiles` are the blocks that the
    library may choose, each (rows, columns, part of that efficiency): padding and the last,
    partly filled wave of tiles come off. `depth_half` is the k at which a tile's start and end
    cost as much as its products. Benchmarks repeat one product; `in_training` is the part of all
    this that is kept in a step, where products alternate with other work under a power limit.
    """

    size: list[Positive]
    efficiency: list[Efficiency]
    units: Count
    tiles: list[tuple[Count, Count, Efficiency]]
    depth_half: NotNegative = 0.0
    wave_loss: Part = 1.0  # part of the last wave's idle cores that is really lost
    # Part of the above that one launch over many experts keeps; experts `grouped_half` wide keep
    # half of it (short products, ragged rows).
    grouped: Kept = 1.0
    grouped_half: NotNegative = 0.0
    # The same for experts' products on a few streams; null: as in one launch.
    streams: Kept = 1.0
    streams_half: NotNegative | None = None
    weight_gradient: Kept = 1.0  # … that products adding to a float32 buffer keep
    dtype: dict[str, Kept] = field(default_factory=dict)  # … that another dtype keeps
    in_training: Kept = 1.0
    # Of few rows, a processor first packs the weights, and computing hides no reading: `reading` is
    # the part of the memory's bandwidth at which a product of `rows` rows goes over its weights,
    # `reading_grouped` that of an expert's, between them in proportion to time. No `rows`: no such
    # limit.
    rows: list[Count] = field(default_factory=list)
    reading: list[Positive] = field(default_factory=list)
    reading_grouped: list[Positive] = field(default_factory=list)


@dataclass(frozen=True)
class Attention:
    """Efficiency of fused attention: `forward` and `backward` are parts of the matrix peak for
    long sequences and heads of 128; half of it is reached at `half_length` keys. Narrower heads
    keep d/(d + `half_head`) relative to 128's. `cache` is the part of the memory efficiency that
    reading keys and values keeps, which is what decoding a token spends its time on;
    `in_training` as with `Matmul`; `flash_2` is the part of the rates that FlashAttention 2
    reaches, `unequal` the part kept where values are narrower than keys."""

    forward: Efficiency
    backward: Efficiency
    half_length: NotNegative
    half_head: NotNegative = 16.0
    cache: Kept = 1.0
    in_training: Kept = 1.0
    flash_2: Kept = 1.0
    unequal: Kept = 1.0


@dataclass(frozen=True)
class Launch:
    """Fixed costs in µs: what one operator of each kind adds on the device, and what the host
    needs to issue one (`host`; the device waits when the host is slower). `step` is what the
    framework spends once per step, whatever the size of the model."""

    matmul: NotNegative
    vector: NotNegative
    collective: NotNegative
    host: NotNegative
    step: NotNegative = 0.0


@dataclass(frozen=True)
class Decoding:
    """What our engine takes around the operators of a decoding pass, in µs, where the processor
    that computes also runs its Python: for the pass; for each sequence; for a layer, and for one
    with experts and one with a shared expert besides; in each layer for a sequence's attention,
    which is a call of its own, with one new token or several; and for an expert that has tokens."""

    whole_pass: NotNegative
    sequence: NotNegative
    layer: NotNegative
    experts: NotNegative
    shared_expert: NotNegative
    attention: NotNegative
    attention_of_several: NotNegative
    expert: NotNegative


@dataclass(frozen=True)
class Overlap:
    """Part of a collective that really disappears behind an operator running beside it; the rest
    shows, as both then compete for memory, copy engines or cores.

    `independent`: a collective issued on another stream (a gradient's reduction beside a weight
    gradient, sharded weights beside the layer before); where it outlasts what runs beside it, it
    is slowed down too, and only the part `beside` of that work disappears in it. `fused`: one cut
    into pieces inside its own matrix product. `exchange`: expert dispatch and combine beside
    another micro-batch's computing; where they are kernels they take cores away, where they are
    copy engines they do not.
    """

    independent: Part = 1.0
    beside: Part = 1.0
    fused: Part = 1.0
    exchange: Part = 1.0


@dataclass(frozen=True)
class Hardware:
    """One device and how many of them are joined. See `Link`, `Matmul`, `Attention`, `Launch`,
    `Decoding`.

    `evidence` gives each figure's grade (`GRADES`) and where it comes from.
    `collective_library` says how collectives cross several levels of links (see
    `simulator.collectives`): all levels at once (nccl), one after another (hccl), or in one ring
    through all ranks (gloo).
    `communicator_buffer_mb` is what the collective library keeps for every group (NCCL: the
    channels of a large one). `process_base_bytes` is what a process holds before there is a model:
    nothing on a device with memory of its own, interpreter and libraries where the process shares
    the host's.
    `memory_overhead` is what the process then holds beyond what is counted, as a part of what would
    come and go within a step that recomputes and swaps nothing (weights stay where they are and
    leave no holes): nothing where the peak is the allocator's, fragmentation where it is the
    process's.
    """

    name: str
    description: str
    peak_tflops: dict[str, Positive]  # dense matrix peak by dtype
    vector_tflops: Positive
    memory_gib: Positive
    memory_bandwidth_gbps: Positive  # GB/s
    memory_efficiency: Efficiency
    links: list[Link]
    matmul: Matmul
    attention: Attention
    launch_us: Launch
    overlap: Overlap
    evidence: dict[str, str]
    devices_per_node: Ranks = 8
    host_link_gbps: NotNegative = 0.0  # GB/s to host memory, one way per device; 0 = unknown
    storage_gbps: NotNegative = 0.0  # GB/s that each device writes when all do; 0 = unknown
    collective_library: Literal["nccl", "hccl", "gloo"] = "nccl"
    communicator_buffer_mb: NotNegative = 200.0
    process_base_bytes: NotNegative = 0.0
    memory_overhead: NotNegative = 0.0
    decoding: Decoding | None = None  # None: hidden behind the device
    power_w: Positive | None = None
    price_per_hour: Positive | None = None  # of one device, in whatever currency
    backend: Literal["cpu", "cuda", "npu"] = "cuda"

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * 2**30

    @property
    def memory_bandwidth(self) -> float:
        """Bytes/s, before `memory_efficiency`."""
        return self.memory_bandwidth_gbps * 1e9

    @property
    def vector_peak(self) -> float:
        """FLOP/s of the vector units."""
        return self.vector_tflops * 1e12

    def peak(self, dtype: str) -> float:
        """FLOP/s of the matrix units.

        Raises:
            ConfigError: the device does not compute in `dtype`.
        """
        if dtype not in self.peak_tflops:
            raise _error(
                "hardware.peak_tflops", dtype, f"{self.name} computes in {sorted(self.peak_tflops)}"
            )
        return self.peak_tflops[dtype] * 1e12


def load_hardware(tree: dict[str, Any] | Hardware | None) -> Hardware:
    """`config.hardware` as a checked `Hardware`.

    Raises:
        ConfigError: with every missing, unknown or impossible figure.
    """
    if isinstance(tree, Hardware):
        return tree
    if not tree:
        known = ", ".join(presets())
        raise _error("hardware", None, "a forecast needs a machine", f"hardware=NAME of {known}")
    try:
        hardware = _adapter().validate_python(tree, extra="forbid")
    except ValidationError as error:
        raise ConfigError(
            [
                Violation(
                    ".".join(["hardware", *(str(part) for part in item["loc"])]),
                    "" if item["type"] == "missing" else item.get("input"),
                    item["msg"].lower(),
                )
                for item in error.errors()
            ]
        ) from None
    violations = [
        Violation(f"hardware.{wrong.key}", wrong.value, wrong.reason)
        for wrong in bounded(hardware)[1]
    ]
    violations += _inconsistent(hardware)
    if violations:
        raise ConfigError(violations)
    return hardware


def read_hardware(path: str | Path) -> Hardware:
    """A preset by name, or a file that calibration wrote.

    Raises:
        ConfigError: there is no such preset or file, or it is not a machine.
    """
    file = Path(path)
    if not file.suffix:
        file = PRESETS / f"{path}.yaml"
    if not file.is_file():
        known = ", ".join(presets())
        raise _error("hardware", path, "no such preset or file", f"one of {known}, or a .yaml file")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as error:
        raise _error("hardware", path, f"not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise _error("hardware", path, "holds no figures")
    return load_hardware(cast(dict[str, Any], tree))


def presets() -> list[str]:
    """Names of the machines in `configs/hardware`."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


@cache
def _adapter() -> TypeAdapter[Hardware]:
    return TypeAdapter(Hardware)


def _error(key: str, value: Any, reason: str, suggestion: str = "") -> ConfigError:
    return ConfigError([Violation(key, value, reason, suggestion)])


_GRADED: tuple[str, ...] = ("peak_tflops", "vector_tflops", "memory_gib", "memory_bandwidth_gbps")
_GRADED += ("memory_efficiency", "links", "matmul", "attention", "launch_us", "overlap")


def _inconsistent(hardware: Hardware) -> list[Violation]:
    violations = [
        Violation("hardware.evidence", name, "this figure has no grade")
        for name in _GRADED
        if name not in hardware.evidence
    ]
    violations += [
        Violation(f"hardware.evidence.{name}", grade, f"starts with one of {list(GRADES)}")
        for name, grade in hardware.evidence.items()
        if grade[:1] not in GRADES
    ]
    matmul = hardware.matmul
    if len(matmul.size) != len(matmul.efficiency) or sorted(matmul.size) != matmul.size:
        violations.append(
            Violation("hardware.matmul.size", matmul.size, "must rise, one per efficiency")
        )
    if {len(matmul.reading), len(matmul.reading_grouped)} != {len(matmul.rows)}:
        violations.append(
            Violation("hardware.matmul.rows", matmul.rows, "one reading, one reading_grouped each")
        )
    if sorted(set(matmul.rows)) != matmul.rows:
        violations.append(Violation("hardware.matmul.rows", matmul.rows, "must rise"))
    sizes = [link.devices for link in hardware.links]
    if not sizes or sizes[-1] != 0 or sorted(sizes[:-1]) != sizes[:-1] or 0 in sizes[:-1]:
        violations.append(
            Violation("hardware.links", sizes, "devices must rise and end with 0 (any number)")
        )
    return violations
