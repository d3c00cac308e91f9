"""From samples to a hardware preset, in the terms of `simulator.operators` and
`simulator.collectives`: whatever a sample does not explain stays at a neutral value."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from pangu.calibration.framework import Framework
from pangu.calibration.samples import Device, Sample
from simulator.api import (
    Attention,
    Decoding,
    Hardware,
    Launch,
    Link,
    Matmul,
    Overlap,
    operator_seconds,
)

# One tile of one element: no quantisation. Where a device has many matrix units, blocks as GPU
# libraries choose them, with the part of the efficiency that each is known to keep.
NO_TILES: list[tuple[int, int, float]] = [(1, 1, 1.0)]
GPU_TILES = [(256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (128, 64, 0.85), (64, 64, 0.65)]
DEPTHS = (0.0, 8.0, 16.0, 32.0, 64.0, 128.0)
HALF_LENGTHS = (0.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
HALF_HEADS = (0.0, 8.0, 16.0, 32.0, 64.0)
LONG = 0.25  # of the longest message: from here on one is long
MICRO = 1e6
LIBRARIES: dict[str, Any] = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


def fit(
    name: str,
    device: Device,
    processes: int,
    framework: Framework,
    decoding: Decoding | None = None,
) -> Hardware:
    """The machine that explains the samples of `device`, one of `processes` that were busy;
    `decoding` is what the decoding engine takes on a CPU."""
    on_cpu = not device.asynchronous
    bandwidth, vector = _memory(device.samples)
    peak = _peak(device)
    # Launching and computing is one thread's work on a CPU; elsewhere the host runs ahead.
    each = framework.operator_seconds * MICRO
    launch = Launch(
        matmul=each if on_cpu else 0.0,
        vector=each if on_cpu else 0.0,
        collective=0.0,
        host=0.0 if on_cpu else each,
        step=framework.step_seconds * MICRO,
    )
    link, collective = link_of("between processes", device.samples)
    if on_cpu:  # elsewhere waking up and waiting is not the host's work
        collective = max(collective, framework.message_seconds * MICRO - link.latency_us)
    shared = processes if on_cpu else 1
    start = Hardware(
        name=name,
        description=f"{device.description}, {device.threads} threads per process",
        peak_tflops={device.precision: peak / 1e12},
        vector_tflops=peak / 1e12 / 4,
        memory_gib=device.memory_bytes / 2**30 / shared,
        memory_bandwidth_gbps=bandwidth / 1e9,
        memory_efficiency=vector / bandwidth,
        links=[link],
        matmul=Matmul(
            size=[1.0],
            efficiency=[1.0],
            units=device.matrix_units,
            tiles=NO_TILES if device.matrix_units == 1 else GPU_TILES,
        ),
        attention=Attention(1.0, 1.0, 0.0, 0.0),
        launch_us=replace(launch, collective=collective),
        overlap=Overlap(0.0, 0.0, 0.0) if on_cpu else Overlap(0.7, 0.7, 0.7),
        evidence={},
        devices_per_node=processes,
        collective_library=LIBRARIES[device.backend],
        host_link_gbps=_host_link(device.samples) / 1e9,
        process_base_bytes=framework.base_bytes if on_cpu else 0.0,
        memory_overhead=framework.memory_overhead if on_cpu else 0.0,
        backend=device.backend,  # type: ignore[arg-type]
    )
    if on_cpu:  # gloo keeps no buffers of its own
        start = replace(start, communicator_buffer_mb=0.0)
    return _with_operators(replace(start, decoding=decoding), device)


def _with_operators(start: Hardware, device: Device) -> Hardware:
    """The machine with the efficiency of products and attention."""
    bare = replace(start, launch_us=Launch(0.0, 0.0, 0.0, 0.0))
    matmul = _matmul(bare, device)
    bare = replace(bare, matmul=matmul)
    matmul = replace(matmul, grouped=_grouped(bare, device))
    attention = _attention(bare, device)
    if not device.asynchronous:
        matmul = _few_rows(matmul, device.samples, start.memory_bandwidth)
    return replace(start, matmul=matmul, attention=attention)


def preset(hardware: Hardware, evidence: dict[str, str]) -> dict[str, Any]:
    """`hardware` as the plain tree of a YAML file, every figure with its grade."""
    tree = asdict(replace(hardware, evidence=evidence))
    tree["matmul"]["tiles"] = [list(tile) for tile in tree["matmul"]["tiles"]]
    return {key: _rounded(value) for key, value in tree.items() if value is not None}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _of(samples: list[Sample], kind: str) -> list[Sample]:
    return [sample for sample in samples if sample.kind == kind]


def _memory(samples: list[Sample]) -> tuple[float, float]:
    """Bytes/s of a long copy, and of the vector operators: of each as often as of the others."""
    (copy,) = _of(samples, "copy")
    vectors = _of(samples, "vector")
    seconds_per_byte = np.mean([sample.seconds / sample.shape["bytes"] for sample in vectors])
    return copy.shape["bytes"] / copy.seconds, 1.0 / float(seconds_per_byte)


def _host_link(samples: list[Sample]) -> float:
    """Bytes/s to the host's memory, or back from it if that is slower."""
    return min(sample.shape["bytes"] / sample.seconds for sample in _of(samples, "host"))


def _peak(device: Device) -> float:
    """FLOP/s: the vendor's, else the fastest product's."""
    if device.peak_tflops:
        return device.peak_tflops * 1e12
    return max(_flops(s) / s.seconds for s in _of(device.samples, "matmul"))


def _flops(sample: Sample) -> float:
    return 2.0 * sample.shape["m"] * sample.shape["n"] * sample.shape["k"]


def _seconds(hw: Hardware, sample: Sample, device: Device) -> Any:
    """What `hw` would take for the operator of a sample."""
    return operator_seconds(hw, sample.kind, **sample.shape, dtype=device.precision)


def _matmul(hw: Hardware, device: Device) -> Matmul:
    """Efficiency by size, the depth that leaves the least scatter around it, and the part that
    weight gradients keep."""
    products = _of(device.samples, "matmul")
    plain = [sample for sample in products if not sample.shape.get("weight_gradient")]
    m, n, k = (np.array([s.shape[key] for s in plain], dtype=float) for key in "mnk")
    seconds = np.array([s.seconds for s in plain])
    size = np.cbrt(m * n * k)
    best: tuple[float, Matmul] | None = None
    for depth in DEPTHS:
        curve = replace(hw.matmul, depth_half=depth)
        trial = replace(hw, matmul=curve, memory_bandwidth_gbps=1e9)
        product: dict[str, Any] = {"m": m, "n": n, "k": k, "dtype": device.precision}
        wanted = operator_seconds(trial, "matmul", **product) / seconds
        knots, values = _curve(size, wanted)
        curve = replace(curve, size=knots, efficiency=values)
        fitted = replace(hw, matmul=curve)
        scatter = _scatter(operator_seconds(fitted, "matmul", **product) / seconds)
        if best is None or scatter < best[0]:
            best = scatter, curve
    assert best is not None
    curve = best[1]
    added = [sample for sample in products if sample.shape.get("weight_gradient")]
    fitted = replace(hw, matmul=curve)
    kept = [_seconds(fitted, s, device) / s.seconds for s in added]
    return replace(curve, weight_gradient=float(np.median(kept)))


def _curve(size: Any, efficiency: Any) -> tuple[list[float], list[float]]:
    """Medians over products of like size, one knot per factor of two."""
    octave = np.round(np.log2(size))
    knots, values = [], []
    for each in np.unique(octave):
        chosen = octave == each
        knots.append(float(np.median(size[chosen])))
        values.append(float(np.median(efficiency[chosen])))
    return knots, values


def _scatter(ratio: Any) -> float:
    return float(np.abs(np.log(ratio)).mean())


def _grouped(hw: Hardware, device: Device) -> float:
    samples = _of(device.samples, "grouped_matmul")
    kept = [_seconds(hw, s, device) / s.seconds for s in samples]
    return float(np.median(kept))


def _few_rows(matmul: Matmul, samples: list[Sample], bandwidth: float) -> Matmul:
    """The part of the bandwidth at which products of few rows go over their weights, where they
    were measured."""
    reading: dict[bool, dict[int, float]] = {False: {}, True: {}}
    for sample in _of(samples, "few_rows"):
        rate = sample.shape["weight_bytes"] / sample.seconds
        reading[sample.shape["grouped"]][sample.shape["rows"]] = rate / bandwidth
    rows = sorted(reading[False])
    linear, grouped = ([reading[kind][each] for each in rows] for kind in (False, True))
    return replace(matmul, rows=rows, reading=linear, reading_grouped=grouped)


def _attention(hw: Hardware, device: Device) -> Attention:
    """The half length and half head that leave the least scatter, and the medians around them."""
    samples = _of(device.samples, "attention")
    backward = np.array([bool(s.shape.get("backward")) for s in samples])
    best: tuple[float, Attention] | None = None
    for half_length, half_head in itertools.product(HALF_LENGTHS, HALF_HEADS):
        curve = Attention(1.0, 1.0, half_length, half_head)
        trial = replace(hw, attention=curve)
        ratio = np.array([_seconds(trial, s, device) / s.seconds for s in samples])
        forth, back = np.median(ratio[~backward]), np.median(ratio[backward])
        scatter = _scatter(ratio / np.where(backward, back, forth))
        if best is None or scatter < best[0]:
            best = scatter, replace(curve, forward=float(forth), backward=float(back))
    assert best is not None
    return best[1]


def link_of(name: str, samples: list[Sample]) -> tuple[Link, float]:
    """The link that joins all who sent them, and µs of issuing a collective.

    Each kind is a line, latency + bytes/rate. An all-reduce waits for twice as many steps as the
    others: the difference is the latency of a step, the rest the cost of issuing.
    """
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "broadcast")
    measured = {kind: _of(samples, kind) for kind in kinds}
    if not all(measured.values()):
        return Link("not measured", 0, 1.0, 0.0, dict.fromkeys(kinds, 1.0)), 0.0  # type: ignore[arg-type]
    starts, rates = {}, {}
    for kind, each in measured.items():
        size = each[0].shape["size"]
        share = 1.0 if kind == "send_recv" else (size - 1) / size
        volume = np.array([s.shape["bytes"] for s in each]) * share
        volume = volume * (2.0 if kind == "all_reduce" else 1.0)
        starts[kind], rates[kind] = _line(volume, np.array([s.seconds for s in each]))
    size = measured["all_reduce"][0].shape["size"]
    once = float(np.median([start for kind, start in starts.items() if kind != "all_reduce"]))
    hops = min(size - 1, 2 * int(np.ceil(np.log2(size))))
    latency = min(max(starts["all_reduce"] - once, 0.0) / hops, once)
    fastest = max(rates.values())
    efficiency: Any = {kind: rate / fastest for kind, rate in rates.items()}
    link = Link(name, 0, fastest / 1e9, latency * MICRO, efficiency)
    return link, (once - latency) * MICRO


def _line(volume: Any, seconds: Any) -> tuple[float, float]:
    """(latency in seconds, bytes/s); relative errors count alike in the latency, which is not below
    zero.

    The rate is that of the long messages, which a step waits for. Short ones pass a slow link in
    one burst, and both ways at once long ones keep half of what short ones get: a line through all
    of them is up to twice too fast for the long.
    """
    columns = np.stack([np.ones_like(seconds), volume], axis=1) / seconds[:, None]
    (start, _), *_ = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)
    start = float(np.clip(start, 0.0, seconds.min()))
    long = volume >= LONG * volume.max()
    return start, float(volume[long].sum() / max((seconds[long] - start).sum(), 1e-9))
