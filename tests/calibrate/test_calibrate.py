"""`python -m pangu.calibrate` for real, and its fit on machines whose figures are known."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.compose import load
from pangu.calibration.decoding import Point, explain
from pangu.calibration.fit import fit, link_of, preset
from pangu.calibration.framework import WIDE, Framework, beyond_counted
from pangu.calibration.messages import SIZES
from pangu.calibration.samples import Device, Sample
from simulator.collectives import collective_seconds
from simulator.hardware import Decoding, Hardware, Kind, load_hardware, read_hardware
from simulator.memory import Memory, measured_peak
from simulator.operators import (
    attention_seconds,
    grouped_matmul_seconds,
    matmul_seconds,
    vector_seconds,
)
from simulator.parameters import count_parameters
from simulator.predict import predict

ROOT = Path(__file__).parents[2]
COST = Framework(30e-6, 2e-3, message_seconds=0.0, base_bytes=4e8, memory_overhead=0.5)
KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
KINDS += ("send_recv", "broadcast")


def calibrate(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pangu.calibrate", *arguments]
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset that two real processes measured."""
    file = tmp_path_factory.mktemp("calibrate") / "here.yaml"
    done = calibrate("--out", str(file), "--quick", "backend.threads=1")
    assert done.returncode == 0, done.stderr
    return file


def test_the_simulator_reads_what_was_measured(measured: Path) -> None:
    hardware = read_hardware(measured)
    assert hardware.name == "here"
    assert hardware.backend == "cpu"
    assert hardware.devices_per_node == 2
    assert 0.01 < hardware.host_link_gbps < 100
    assert hardware.process_base_bytes > 1e8  # an interpreter with torch in it
    assert hardware.launch_us.step + hardware.launch_us.matmul > 1.0
    assert hardware.decoding is not None
    assert hardware.decoding.layer + hardware.decoding.whole_pass > 10.0
    assert len(hardware.matmul.rows) == len(hardware.matmul.reading) > 0
    assert set(hardware.peak_tflops) == {"fp32"}
    assert "torch" in measured.read_text().splitlines()[1]
    config = load([f"hardware={measured}", "model=moge_tiny", "parallel=ep2", "devices=2"])
    forecast = predict(config)
    assert forecast.peak_dtype == "fp32"
    assert np.isfinite(forecast.step_seconds)
    assert forecast.step_seconds > 1e-3
    assert forecast.peak_memory_gib * 2**30 > hardware.process_base_bytes
    assert forecast.breakdown["expert dispatch and combine"] > 0


def test_more_work_takes_longer_on_the_measured_machine(measured: Path) -> None:
    hardware = read_hardware(measured)
    rows = np.array([64, 256, 1024, 4096])
    for seconds in (
        matmul_seconds(hardware, rows, 512, 512, dtype="fp32"),
        grouped_matmul_seconds(hardware, 8, rows, 256, 256, dtype="fp32"),
        vector_seconds(hardware, rows * 4096),
        collective_seconds(hardware, "all_gather", rows * 4096, 2),
        collective_seconds(hardware, "send_recv", rows * 4096, 2),
    ):
        assert (np.diff(seconds) > 0).all()


def machine() -> Hardware:
    """A CPU-like machine whose every figure the fit should find again."""
    known = read_hardware("a100")
    link = replace(
        known.links[-1],
        bandwidth_gbps=2.0,
        latency_us=40.0,
        all_reduce_half_mib=0.0,  # between nodes of a cluster; nothing here measures it
        efficiency=dict(zip(KINDS, (0.5, 0.8, 0.4, 0.9, 1.0, 0.7), strict=True)),
    )
    return replace(
        known,
        backend="cpu",
        peak_tflops={"fp32": 0.1},
        memory_bandwidth_gbps=20.0,
        memory_efficiency=0.5,
        links=[link],
        matmul=replace(
            known.matmul,
            size=[64.0, 1024.0],
            efficiency=[0.4, 0.8],
            units=1,
            tiles=[(1, 1, 1.0)],
            depth_half=32.0,
            grouped=0.7,
            grouped_half=0.0,
            weight_gradient=0.9,
            in_training=1.0,
        ),
        attention=replace(
            known.attention, forward=0.6, backward=0.4, half_length=128.0, half_head=16.0,
            in_training=1.0,
        ),
        launch_us=replace(known.launch_us, matmul=0.0, vector=0.0, collective=0.0),
    )  # fmt: skip


def sampled(hw: Hardware) -> Device:
    """What calibration would measure on `hw`."""
    samples = [Sample("copy", {"bytes": 2**27}, 2**27 / hw.memory_bandwidth)]
    for way, gbps in (("out", 3.0), ("back", 2.5)):
        samples.append(Sample("host", {"bytes": 2**25, "way": way}, 2**25 / gbps / 1e9))
    samples += [
        Sample("vector", {"bytes": 2**size}, float(vector_seconds(hw, 2**size)))
        for size in (18, 20, 22)
    ]

    def add(kind: str, timing: Any, **shape: Any) -> None:
        samples.append(Sample(kind, shape, float(timing(hw, **shape, dtype="fp32"))))

    for side in (64, 128, 256, 512, 1024):
        for m, n, k in ((side, side, side), (4 * side, side, side / 4), (side / 2, side, 2 * side)):
            add("matmul", matmul_seconds, m=m, n=n, k=k)
            add("matmul", matmul_seconds, m=m, n=n, k=k, weight_gradient=True)
    for rows in (128, 512):
        add("grouped_matmul", grouped_matmul_seconds, groups=8, m_per_group=rows, n=256, k=256)
    for length, head in ((128, 64), (512, 32), (512, 128), (1024, 64)):
        for backward in (False, True):
            add("attention", attention_seconds, batch=2, heads=8, seq_q=length, seq_kv=length,
                qk_dim=head, v_dim=head, kv_heads=2, backward=backward)  # fmt: skip
    for kind in KINDS:
        for size in (2**12, 2**18, 2**22, 2**24):
            seconds = float(collective_seconds(hw, kind, size, 2))
            samples.append(Sample(kind, {"bytes": size, "size": 2}, seconds))
    return Device("cpu", False, "a machine", "fp32", 2**34, 1, 0.1, 1, "torch 0", samples)


def test_the_fit_finds_a_known_machine_again() -> None:
    known = machine()
    found = fit("again", sampled(known), 2, COST)
    assert found.memory_bandwidth == pytest.approx(known.memory_bandwidth)
    assert found.memory_efficiency == pytest.approx(known.memory_efficiency)
    assert found.host_link_gbps == pytest.approx(2.5)
    assert found.memory_gib == 8.0  # two processes share 16
    assert found.matmul.depth_half == known.matmul.depth_half
    assert found.matmul.weight_gradient == pytest.approx(known.matmul.weight_gradient, rel=0.05)
    assert found.matmul.grouped == pytest.approx(known.matmul.grouped, rel=0.05)
    assert found.attention.half_length == known.attention.half_length
    assert found.attention.half_head == known.attention.half_head
    assert found.attention.forward == pytest.approx(known.attention.forward, rel=0.01)
    assert found.attention.backward == pytest.approx(known.attention.backward, rel=0.01)
    assert found.launch_us.matmul == pytest.approx(30.0)
    assert found.launch_us.step == pytest.approx(2000.0)
    # Products in between the measured ones, and messages of other sizes.
    bare = replace(found, launch_us=replace(found.launch_us, matmul=0.0))
    shapes = [(300, 500, 200), (96, 700, 300), (1000, 900, 800)]
    for m, n, k in shapes:
        expected = matmul_seconds(known, m, n, k, dtype="fp32")
        assert matmul_seconds(bare, m, n, k, dtype="fp32") == pytest.approx(expected, rel=0.1)
    for kind in KINDS:
        expected = collective_seconds(known, kind, 2**20, 2)
        assert collective_seconds(found, kind, 2**20, 2) == pytest.approx(expected, rel=0.01)


def test_the_rate_is_that_of_long_messages() -> None:
    """Two nodes behind 200 Mbit/s: the first 256 KiB pass at once, and of messages both ways long
    ones keep half of it (seconds as measured there, of exchanges of 4 KiB to 16 MiB)."""
    milliseconds = (0.2, 0.7, 5.3, 23.1, 67.1, 109.4, 330.5, 681.5)
    samples = [
        Sample(kind, {"bytes": size, "size": 2}, once / 1e3)
        for kind in KINDS
        for size, once in zip(SIZES, milliseconds, strict=True)
    ]
    link, _ = link_of("slow", samples)
    rate = link.bandwidth * link.efficiency["all_to_all"]
    assert 2**23 / rate == pytest.approx(0.6815, rel=0.15)  # half of 16 MiB
    assert 2**22 / rate == pytest.approx(0.3305, rel=0.15)
    assert 0 <= link.latency_us < 1000


def test_a_message_of_a_step_costs_at_least_what_it_was_seen_to_cost() -> None:
    slow = fit("slow", sampled(machine()), 2, replace(COST, message_seconds=5e-3))
    assert collective_seconds(slow, "all_gather", 4, 2) == pytest.approx(5e-3, rel=0.01)


def test_what_stays_leaves_no_holes() -> None:
    known = fit("holes", sampled(machine()), 2, COST)
    memory = Memory(
        weights=1e8, gradients=2e8, optimizer=3e8, activations=5e7, temporary=1e7, buffers=0,
        leaves_holes=8e7,
    )  # fmt: skip
    assert measured_peak(known, memory) == pytest.approx(6e8 + 6e7 + 0.5 * 8e7 + 4e8)


def test_holes_are_counted_in_the_precision_of_the_run(measured: Path) -> None:
    memory = predict(load([*WIDE, f"hardware={measured}"])).stages[0].memory
    weights = 4 * count_parameters(load(WIDE)).allocated
    assert (memory.weights, memory.kept) == pytest.approx((weights, 4 * weights))  # float32
    for part in (0.0, 0.7):
        held = float(memory.kept + (1 + part) * memory.passing)
        found = beyond_counted([*WIDE, "hardware.backend=cpu"], held)
        assert found == pytest.approx(part, abs=1e-9)


def test_one_process_has_no_links_and_still_makes_a_preset() -> None:
    device = sampled(machine())
    device.samples = [sample for sample in device.samples if sample.kind not in KINDS]
    found = fit("alone", device, 1, COST)
    assert [link.name for link in found.links] == ["not measured"]
    graded = dict.fromkeys(vars(found), "M: here")
    del graded["evidence"]
    assert load_hardware(preset(found, graded)).matmul.depth_half == found.matmul.depth_half


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "here.txt"], "must end with .yaml"),
        (["--out", "nowhere/here.yaml"], "there is no folder nowhere"),
        (["--out", "here.yaml", "train.steps=3"], "only backend=… and backend.… matter here"),
        (["--out", "here.yaml", "backend=tpu"], "there is no file configs/backend/tpu.yaml"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = calibrate(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_costs_of_decoding_are_found_again() -> None:
    """From steps of models with and without experts, as `calibration.decoding` takes them."""
    known = Decoding(400.0, 20.0, 130.0, 500.0, 120.0, 15.0, 40.0, 8.0)
    kinds = ((False, False), (True, False), (True, True))
    plan = itertools.product((2, 6), kinds, (1, 8, 32), (1, 4))
    points = []
    for layers, (experts, shared), sequences, tokens in plan:
        touched = 16 * (1 - 0.75 ** (sequences * tokens)) if experts else 0.0
        attention = known.attention if tokens == 1 else known.attention_of_several
        micro = known.whole_pass + known.sequence * sequences
        micro += layers * (known.layer + attention * sequences)
        micro += layers * experts * (known.experts + known.expert * touched)
        micro += layers * shared * known.shared_expert
        depth = (layers, layers * experts, layers * shared)
        point = Point(*depth, sequences, tokens, touched, micro * 1e-6)
        points.append(point)
    assert vars(explain(points)) == pytest.approx(vars(known), rel=1e-6)
    cheaper = [point._replace(seconds=point.seconds - 400e-6) for point in points]
    assert explain(cheaper).whole_pass == pytest.approx(0, abs=1e-6)
    assert min(vars(explain([p._replace(seconds=p.seconds - 5e-4) for p in points])).values()) >= 0


def test_products_of_few_rows_are_found_again() -> None:
    known = machine()
    few = replace(known.matmul, rows=[1, 8], reading=[0.4, 0.2], reading_grouped=[0.5, 0.1])
    few_rows = replace(known, matmul=few)
    device = sampled(known)
    for rows in few.rows:
        size = {"rows": rows, "weight_bytes": 512 * 1024 * 4}
        linear = matmul_seconds(few_rows, rows, 1024, 512, dtype="fp32")
        grouped = grouped_matmul_seconds(few_rows, 8, rows, 1024, 512, dtype="fp32") / 8
        for kind, seconds in ((False, linear), (True, grouped)):
            device.samples.append(Sample("few_rows", size | {"grouped": kind}, float(seconds)))
    found = fit("few", device, 1, COST).matmul
    assert (found.rows, found.reading) == ([1, 8], pytest.approx([0.4, 0.2]))
    assert found.reading_grouped == pytest.approx([0.5, 0.1])
