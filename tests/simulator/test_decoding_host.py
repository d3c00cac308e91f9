"""Decoding where the processor that computes also runs the engine's Python."""

import json
from dataclasses import replace

import numpy as np
import pytest

from configs.compose import load
from configs.violation import ConfigError
from simulator.decoding_host import touched_experts
from simulator.hardware import Decoding, load_hardware, read_hardware
from simulator.inference import decode_step, memory_bytes, prefill
from simulator.moesd import read_touched
from simulator.operators import grouped_matmul_seconds, matmul_seconds
from simulator.serving import serving
from simulator.speculation import speculate

COSTS = Decoding(400.0, 20.0, 130.0, 500.0, 120.0, 15.0, 40.0, 8.0)
MODEL = ["model=moge_tiny", "moe=top_k", "moe.top_k=4", "moe.num_expert_groups=1"]
MODEL += ["model.num_dense_layers=1", "model.ffn_hidden_size=256", "devices=1", "hardware=a100"]
MODEL += ["inference.draft=ngram", "inference.prompt_length=64", "inference.max_new_tokens=64"]


def processor(**figures):
    """A machine without 16 bits, one core, and no launches but those of Python."""
    known = read_hardware("a100")
    matmul = replace(known.matmul, units=1, tiles=[(1, 1, 1.0)], depth_half=0.0)
    figures = {"matmul": matmul, "decoding": COSTS, **figures}
    return replace(known, peak_tflops={"fp32": 0.1}, memory_bandwidth_gbps=20.0, **figures)


def layout(hardware, *overrides):
    return serving(load([*MODEL, *overrides]), hardware)


@pytest.mark.parametrize(("sequences", "tokens"), [(1, 1), (8, 1), (8, 5)])
def test_what_python_takes_by_hand(sequences, tokens):
    free = Decoding(*[0.0] * len(vars(COSTS)))
    with_costs = decode_step(layout(processor()), sequences, 96, tokens)
    bare = decode_step(layout(processor(decoding=free)), sequences, 96, tokens)
    attention = 15 if tokens == 1 else 40
    woken = 16 * (1 - (12 / 16) ** (sequences * tokens))
    expected = 400 + 20 * sequences + 4 * (130 + attention * sequences)
    expected += 3 * (500 + 120 + 8 * woken)
    assert with_costs.seconds - bare.seconds == pytest.approx(expected * 1e-6)
    # Operators cost no launch beside: a model of no width would take this alone.
    launches = decode_step(layout(processor(decoding=None)), sequences, 96, tokens)
    assert launches.seconds > bare.seconds + 50e-6


def test_a_prompt_is_one_call_of_attention_a_layer():
    parts = prefill(layout(processor()), 1, 96).parts
    assert parts["host"] == pytest.approx(420e-6)
    assert parts["host_layers"] == pytest.approx((4 * 170 + 3 * (620 + 8 * 16)) * 1e-6)
    routed = layout(processor(), "model.shared_expert_ffn_hidden_size=0")
    fewer = parts["host_layers"] - prefill(routed, 1, 96).parts["host_layers"]
    assert fewer == pytest.approx(3 * 120e-6)


def test_few_rows_take_what_was_measured():
    known = processor()
    few = {"rows": [1, 4], "reading": [0.5, 0.25], "reading_grouped": [0.4, 0.1]}
    hw = replace(known, matmul=replace(known.matmul, **few),
                 launch_us=replace(known.launch_us, matmul=0.0))  # fmt: skip
    weights = 512 * 1024 * 4 / 20e9  # seconds at the bandwidth
    found = matmul_seconds(hw, np.array([1, 2, 4]), 1024, 512, dtype="fp32")
    assert found / weights == pytest.approx([2, 2 + 2 / 3, 4])  # in proportion to time
    grouped = grouped_matmul_seconds(hw, 8, np.array([0, 1, 4]), 1024, 512, dtype="fp32")
    assert grouped / (8 * weights) == pytest.approx([0, 2.5, 10])
    many = matmul_seconds(hw, 4096, 1024, 512, dtype="fp32")
    without = replace(hw, matmul=replace(known.matmul, in_training=known.matmul.in_training))
    assert many == pytest.approx(matmul_seconds(without, 4096, 1024, 512, dtype="fp32"))
    rising = matmul_seconds(hw, np.arange(1, 200), 1024, 512, dtype="fp32")
    assert (np.diff(rising) >= 0).all()


def test_sixteen_bits_are_float32_where_there_are_none():
    here, there = layout(processor()), layout(read_hardware("a100"))
    assert here.options.weight_dtype == here.options.kv_dtype == "fp32"
    assert there.options.weight_dtype == "bf16"
    weights = [float(memory_bytes(each, 0)) for each in (here, there)]
    assert weights[0] == pytest.approx(2 * weights[1])
    assert layout(processor(), "inference.kv_dtype=int8").options.kv_dtype == "int8"


def test_a_draft_from_a_file_of_its_own(tmp_path):
    file = tmp_path / "draft.yaml"
    file.write_text("model: {name: small, num_layers: 1, hidden_size: 64, num_attention_heads: 2, "
                    "num_query_groups: 1, kv_channels: 32, vocab_size: 1024, "
                    "ffn_hidden_size: 128}\n")  # fmt: skip
    drafted = layout(processor(), f"inference.draft={file}")
    assert drafted.draft.model.name == "small"
    times = speculate(drafted, np.array([1, 32]), 4)
    assert (times.draft > 400e-6).all()
    assert (times.speedup < speculate(layout(processor()), np.array([1, 32]), 4).speedup).all()
    with pytest.raises(ConfigError, match="is not mtp, ngram, or a model's name or file"):
        layout(processor(), f"inference.draft={tmp_path / 'none.yaml'}")


def test_rows_without_their_readings_are_refused():
    matmul = replace(processor().matmul, rows=[4, 1], reading=[0.5], reading_grouped=[0.5, 0.5])
    tree = {**vars(processor()), "matmul": vars(matmul), "decoding": vars(COSTS)}
    with pytest.raises(ConfigError) as refused:
        load_hardware({**tree, "launch_us": vars(tree["launch_us"])})
    reasons = [str(each) for each in refused.value.violations]
    assert any("one reading, one reading_grouped each" in each for each in reasons)
    assert any("must rise" in each for each in reasons)


def test_experts_that_passes_touched_take_the_place_of_those_expected(tmp_path):
    file = tmp_path / "measured.json"
    rows = [(1, 0, 4.0), (4, 0, 9.0), (2, 1, 7.0), (4, 3, 12.0), (8, 0, None)]
    names = ("sequences", "guesses", "experts")
    rounds = [dict(zip(names, row, strict=True)) for row in rows]
    file.write_text(json.dumps({"acceptance": [], "rounds": rounds}))
    measured = read_touched(file)
    assert [list(each) for each in measured] == [[1, 4, 16], [4, 8, 12]]
    plain = layout(processor())
    told = replace(plain, touched=measured)
    assert touched_experts(told, np.array([1, 2, 4, 8, 64])) == pytest.approx([4, 6, 8, 10, 12])
    fewer = decode_step(plain, 16, 96).seconds - decode_step(told, 16, 96).seconds
    assert fewer > 3 * 8e-6 * (touched_experts(plain, 16) - 12)  # their calls and their weights
    for wrong in ("[]", '{"rounds": []}', '{"rounds": [{"sequences": 1}]}', "x"):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match="--touched"):
            read_touched(file)
