"""Presets against the published tables that they summarise, and what a bad file is told."""

from dataclasses import replace

import numpy as np
import pytest

from configs.compose import load
from configs.violation import ConfigError
from simulator.collectives import collective_seconds
from simulator.hardware import Hardware, Kind, load_hardware, presets, read_hardware
from simulator.operators import (
    attention_seconds,
    grouped_matmul_seconds,
    matmul_seconds,
    memory_seconds,
    vector_seconds,
)
from simulator.passes import outlasting

NAMES = ["a100", "a100_pcie", "a800", "ascend_910b_280t", "ascend_910b_313t", "ascend_910b_376t"]
NAMES += ["ascend_910c_die", "ascend_a5", "atlas_300i_duo", "b200", "b300", "cloudmatrix384"]
NAMES += ["gb200", "gb300", "h100", "h100_96g", "h200", "h800", "l40"]


def benchmarked(name: str) -> Hardware:
    """A machine that runs one operator over and over, as the published benchmarks do."""
    hw = read_hardware(name)
    return replace(
        hw,
        memory_efficiency=0.85,
        matmul=replace(hw.matmul, in_training=1.0),
        attention=replace(hw.attention, in_training=1.0),
    )


def test_every_preset_loads_through_the_configuration_tree() -> None:
    assert presets() == NAMES
    assert {name: read_hardware(name).name for name in NAMES} == {name: name for name in NAMES}
    for name in ("a100", "ascend_910c_die"):
        assert load_hardware(load([f"hardware={name}"]).hardware) == read_hardware(name)
    assert read_hardware("ascend_910b_376t").peak("bf16") == 353.9e12
    assert read_hardware("h200").memory_bandwidth == 4.8e12


def test_bad_machines_are_refused_with_every_mistake(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=r"hardware\.memory_gib=-1"):
        load_hardware(load(["hardware=a100", "hardware.memory_gib=-1"]).hardware)
    with pytest.raises(ConfigError, match=r"(?s)nan.*hardware\.links"):
        load_hardware(
            load(["hardware=a100", "hardware.vector_tflops=nan", "hardware.links=[]"]).hardware
        )
    with pytest.raises(ConfigError, match=r"hardware\.colour"):
        load_hardware(load(["hardware=a100", "hardware.colour=red"]).hardware)
    with pytest.raises(ConfigError, match="hardware=NAME of a100"):
        load_hardware(None)
    with pytest.raises(ConfigError, match="a100 computes in"):
        read_hardware("a100").peak("fp8")
    with pytest.raises(ConfigError, match="no such preset"):
        read_hardware("a1000")
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(ConfigError, match="holds no figures"):
        load([f"hardware={empty}"])


def test_a_file_of_calibration_is_a_preset(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from simulator.hardware import PRESETS

    file = tmp_path / "here.yaml"
    file.write_text((PRESETS / "h100.yaml").read_text().replace("name: h100", "name: here", 1))
    hardware = load_hardware(load([f"hardware={file}", "hardware.power_w=650"]).hardware)
    assert (hardware.name, hardware.power_w) == ("here", 650)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("a100", [0.07, 0.28, 0.49, 0.70, 0.81, 0.85, 0.89, 0.90, 0.92]),
        ("h100", [0.04, 0.18, 0.35, 0.65, 0.82, 0.83, 0.83, 0.80, 0.78]),
        ("h200", [0.06, 0.24, 0.47, 0.75, 0.82, 0.82, 0.82, 0.78, 0.76]),
    ],
)
def test_matrix_efficiency_by_rows_follows_the_measured_table(name: str, published) -> None:  # type: ignore[no-untyped-def]
    hw = benchmarked(name)
    rows = np.array([16, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
    reached = [
        2.0 * rows * n * n / matmul_seconds(hw, rows, n, n) / hw.peak("bf16") for n in (4096, 8192)
    ]
    error = np.mean(reached, axis=0) - published
    # The knee, where a product turns from memory-bound to compute-bound, is sharper than life.
    assert np.abs(error).max() < 0.17
    assert abs(error.mean()) < 0.04


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("a100", (222, 205, 213, 203)),
        ("h100", (445, 335, 336, 315)),
        ("b200", (704, 617, 613, 563)),
    ],
)
def test_bus_bandwidth_inside_a_node_follows_the_measured_table(name: str, published) -> None:  # type: ignore[no-untyped-def]
    hw = read_hardware(name)
    size = 512 * 2**20
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    for kind, expected in zip(kinds, published, strict=True):
        passes = 2 if kind == "all_reduce" else 1
        reached = passes * 7 / 8 * size / collective_seconds(hw, kind, size, 8) / 1e9
        assert reached == pytest.approx(expected, rel=0.03)


def test_expert_dispatch_between_h100_nodes_follows_the_published_times() -> None:
    payload = 4096 * 8 * 7168 * 2
    microseconds = 1e6 * collective_seconds(
        read_hardware("h100"), "all_to_all", payload, [8, 16, 32, 64]
    )
    assert microseconds == pytest.approx([1265, 5774, 8059, 9164], rel=0.07)


def test_hccs_full_mesh_reaches_the_part_of_its_links() -> None:
    hw = read_hardware("ascend_910b_376t")
    size = 2**30
    for group, reached in ((2, 28e9), (4, 84e9), (8, 196e9)):
        expected = size * (group - 1) / group / (reached * 0.7) + 17.5e-6
        seconds = collective_seconds(hw, "all_gather", size, group)
        assert seconds == pytest.approx(expected, rel=1e-3)


def test_gathering_goes_round_a_ring_where_reducing_has_trees() -> None:
    """From 8 devices to 1,024, one byte: NCCL gathers in 127 more steps of 4 us; its trees, and
    HCCL, take twice the logarithm."""

    def between_nodes(machine: str, kind: Kind) -> float:
        hw = read_hardware(machine)
        near, far = (collective_seconds(hw, kind, 1.0, size) for size in (8, 1024))
        return float(far - near) * 1e6

    assert between_nodes("h100", "all_gather") == pytest.approx(127 * 4)
    assert between_nodes("h100", "reduce_scatter") == pytest.approx(127 * 4)
    assert between_nodes("h100", "all_reduce") == pytest.approx(2 * 14 * 4)
    assert between_nodes("ascend_910b_376t", "all_gather") == pytest.approx(14 * 1.5)


def leaving_a_node(kind: str, bytes: float, size: int, stride: int, per_node: int) -> float:
    """What the first node sends when every group of `size` ranks, `stride` apart, does so over
    gloo, counted message by message."""
    sent = 0.0
    for first in range(stride):
        ranks = [first + stride * place for place in range(size)]
        if kind == "reduce_scatter":  # an exchange, and a sum where it arrives
            hops = [(a, b, bytes / size) for a in ranks for b in ranks if a != b]
        else:  # every block goes around but for the last hop
            rounds = 2 if kind == "all_reduce" else 1
            around = zip(ranks, ranks[1:] + ranks[:1], strict=True)
            hops = [(a, b, rounds * (size - 1) * bytes / size) for a, b in around]
        sent += sum(part for a, b, part in hops if a < per_node <= b)
    return sent


@pytest.mark.parametrize("kind", ["all_gather", "all_reduce", "reduce_scatter"])
@pytest.mark.parametrize(("size", "stride"), [(4, 1), (8, 1), (2, 2), (4, 2), (2, 4)])
def test_a_ring_of_gloo_fills_the_card_of_a_node(kind: Kind, size: int, stride: int) -> None:
    per_node = 2
    hw = read_hardware("h100")
    fast, slow = hw.links
    hw = replace(
        hw,
        collective_library="gloo",
        launch_us=replace(hw.launch_us, collective=0.0),
        links=[
            replace(fast, devices=per_node, bandwidth_gbps=1e6, latency_us=0.0, half_mib=0.0),
            replace(
                slow,
                bandwidth_gbps=1.0,
                latency_us=0.0,
                half_mib=0.0,
                all_reduce_half_mib=0.0,
                devices_per_port=per_node,
                efficiency=dict.fromkeys(slow.efficiency, 1.0),
            ),
        ],
    )
    bytes = 2.0**30
    # Groups beside each other on a node share its card.
    expected = leaving_a_node(kind, bytes, size, min(stride, per_node), per_node) / 1e9
    measured = collective_seconds(hw, kind, bytes, size, stride)
    assert measured == pytest.approx(expected, rel=1e-6)


def test_placement_contention_and_bad_groups() -> None:
    hw = read_hardware("h100")
    size = 2**28
    inside = collective_seconds(hw, "all_gather", size, 8)
    across = collective_seconds(hw, "all_gather", size, 8, stride=8)
    assert across / inside == pytest.approx(450 * 0.744 / (50 * 0.85), rel=0.03)
    # Sixteen neighbours: the eight network ports of a node carry half the data between them.
    both = collective_seconds(hw, "all_gather", size, 16)
    assert both == pytest.approx(size * 15 / 16 / (450e9 * 0.744), rel=0.10)
    assert collective_seconds(hw, "all_gather", size, 8, concurrent=2) > 1.9 * inside
    assert collective_seconds(hw, "all_reduce", size, 1) == 0
    grid = collective_seconds(hw, "all_reduce", np.array([[1e6], [1e9]]), np.array([2, 8, 64]))
    assert grid.shape == (2, 3)
    assert (grid[1] > grid[0]).all()


def test_operators_by_hand() -> None:
    hw = benchmarked("a100")
    assert memory_seconds(hw, 2.039e12 * 0.85) == pytest.approx(1.0)
    assert vector_seconds(hw, 0) == 0
    # A long product: 4096 x 4096 x 4096 is 512 tiles of 256x128 on 108 cores, 4.74 of 5 waves.
    waves = 512 / 108
    reached = 0.93 * (1 - 0.5 * (1 - waves / 5)) * 4096 / (4096 + 64)
    expected = 2 * 4096**3 / (312e12 * reached) + 3e-6
    assert matmul_seconds(hw, 4096, 4096, 4096) == pytest.approx(expected)
    # One row per expert is bound by the experts' weights, read once each.
    grouped = grouped_matmul_seconds(hw, 64, 1, 1344, 5120)
    weights = 64 * (1344 * 5120 + 1344 + 5120) * 2 / (2.039e12 * 0.85)
    assert grouped == pytest.approx(weights + 3e-6)


def test_attention_forward_backward_follow_the_published_rates() -> None:
    """Latent heads (192 and 128 wide) as published; heads of 128 at 4K as measured on an H200, of
    which FlashAttention 2 reaches 335 (arXiv 2307.08691)."""
    hw = benchmarked("h100")
    plain = {"batch": 8, "heads": 32, "seq_q": 4096, "seq_kv": 4096, "qk_dim": 128, "v_dim": 128}
    pairs = 8 * 32 * 4096 * 4097 / 2
    for rate, traits in ((615, {}), (487, {"backward": True})):
        flops = pairs * 2 * 128 * (5 if traits else 2)
        seconds = attention_seconds(hw, **plain, **traits)
        assert flops / seconds / 1e12 == pytest.approx(rate, rel=0.02)
    older = attention_seconds(hw, **plain | {"seq_q": 16384, "seq_kv": 16384}, flash_2=True)
    assert pairs * 16 * 2 * 128 * 2 / older / 1e12 == pytest.approx(335, rel=0.05)
    shape = {"batch": 1, "heads": 128, "qk_dim": 192, "v_dim": 128}
    for seq, forward, backward in ((4096, 553, 422), (16384, 638, 523)):
        pairs = 128 * seq * (seq + 1) / 2
        for is_backward, flops, published in (
            (False, 2 * pairs * 320, forward),
            (True, 2 * pairs * (3 * 192 + 2 * 128), backward),
        ):
            seconds = attention_seconds(hw, seq_q=seq, seq_kv=seq, backward=is_backward, **shape)
            assert flops / seconds / 1e12 == pytest.approx(published, rel=0.17)
    fused = attention_seconds(hw, seq_q=4096, seq_kv=4096, **shape)
    assert attention_seconds(hw, seq_q=4096, seq_kv=4096, fused=False, **shape) > 3 * fused


def test_what_outlasts_its_work_slows_it_down() -> None:
    """Of 10 s of messages beside 4 s of work 0.5 x 4 s disappear, beside 40 s 0.7 x 10 s."""
    h100 = read_hardware("h100")
    hw = replace(h100, overlap=replace(h100.overlap, independent=0.7, beside=0.5))
    assert outlasting(hw, 10.0, 4.0) == pytest.approx(8.0)
    assert outlasting(hw, 10.0, 40.0) == pytest.approx(3.0)


def test_small_all_reduces_between_nodes_are_far_below_the_link() -> None:
    """Tensor parallelism of 16 over two nodes: 8 MiB reach a fifth of what the link would carry,
    gradients of gigabytes nearly all of it; inside a node nothing changes."""
    hw = read_hardware("a100")
    level = hw.links[-1]
    plain = replace(hw, links=[*hw.links[:-1], replace(level, all_reduce_half_mib=0)])

    def slower(mib: float, size: int, kind: str = "all_reduce") -> float:
        bytes = mib * 2**20
        return float(
            collective_seconds(hw, kind, bytes, size)  # type: ignore[arg-type]
            / collective_seconds(plain, kind, bytes, size)  # type: ignore[arg-type]
        )

    assert 1.5 < slower(8, 16) < 5.0
    assert slower(8192, 16) == pytest.approx(1.0, abs=0.01)
    assert slower(8, 8) == 1.0
    assert slower(8, 16, "all_to_all") == 1.0


def test_all_reduce_on_two_nodes_of_h100() -> None:
    """NCCL 2.20 on two nodes of eight over InfiniBand (README of
    github.com/drmysore/nebius-h100-16gpu-benchmark): 22, 125, 304 and 435 GB/s of bus bandwidth."""
    hw = read_hardware("h100")
    published = {1: 0.088, 10: 0.157, 100: 0.647, 1024: 4.520}  # MiB, ms
    for mib, milliseconds in published.items():
        seconds = float(collective_seconds(hw, "all_reduce", mib * 2**20, 16))
        assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.35), mib
    # the size at which half of the large messages' rate is reached lies between 10 and 100 MB
    half = collective_seconds(hw, "all_reduce", 32 * 2**20, 16)
    assert 0.4 < 32 * 2**20 / half / (2**30 / collective_seconds(hw, "all_reduce", 2**30, 16)) < 0.7
