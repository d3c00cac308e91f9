"""What a configuration is called by other simulators, without them: `benchmarks/adapters`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapters import for_calculon, for_llm_analysis, for_simumax
from adapters.registry import PEERS
from adapters.speed import LAYOUTS, as_arrays, sweep
from peers import forecastable, in_row_unit, share

from configs.schema import MemoryConfig
from simulator.evaluate import evaluate
from simulator.layout import from_config
from simulator.validation.engine import Case

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def rows() -> dict[str, Case]:
    return {found.row["id"]: found for found in forecastable()}


def test_korthikanti_in_calculons_words(rows: dict[str, Case]) -> None:
    # 175B with sequence parallelism and selective recomputation: 64 devices, TP8, PP8, VPP3.
    said = for_calculon.settings(rows["korth_4"].config)
    assert said["system"] == "a100_80g"
    assert said["application"] == {
        "hidden": 12288,
        "feedforward": 49152,
        "seq_size": 2048,
        "attn_heads": 96,
        "attn_size": 128,
        "num_blocks": 96,
    }
    expected = {
        "num_procs": 64,
        "tensor_par": 8,
        "pipeline_par": 8,
        "data_par": 1,
        "tensor_par_net": 0,
        "pipeline_par_net": 1,
        "batch_size": 64,
        "activation_recompute": "attn_only",
        "pipeline_interleaving": 3,
        "optimizer_sharding": False,
        "tensor_par_comm_type": "rs_ag",
        "seq_par_ag_redo": True,
        "data_par_overlap": False,
    }
    assert {key: said["execution"][key] for key in expected} == expected
    full = for_calculon.settings(rows["korth_3"].config)["execution"]
    assert (full["activation_recompute"], full["tensor_par_comm_type"]) == ("full", "ar")
    assert not full["seq_par_ag_redo"]


def test_a_node_in_calculons_words(rows: dict[str, Case]) -> None:
    config = rows["korth_4"].config
    parallel = replace(
        config.parallel, pipeline_model_parallel_size=1, tensor_model_parallel_size=2
    )
    said = for_calculon.settings(replace(config, parallel=parallel, devices=8))["execution"]
    assert (said["data_par"], said["data_par_net"]) == (4, 0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("simumax_llama3_70b_l12_tp4_pp1_dp2_mbc4_cef", "no system file for the device"),
        ("sc21_t2_7", "sharded weights"),
    ],
)
def test_calculon_has_no_words(rows: dict[str, Case], row: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        for_calculon.settings(rows[row].config)


def test_deepseek_in_simumax_words(rows: dict[str, Case]) -> None:
    said = for_simumax.settings(rows["simumax_deepseekv2_tp1_ep4_pp2_dp4_l4_mbc8_cef"].config)
    assert said["system"] == "b200_bf16_ceperm"
    model = {
        "layer_num": 4,
        "hidden_size": 5120,
        "head_size": 128,
        "qk_pos_emb_head_dim": 64,
        "expert_num": 160,
        "topk": 6,
        "moe_ffn_hidden_size": 1536,
        "moe_shared_expert_intermediate_size": 3072,
        "dense_layers": 1,
    }
    assert {key: said["model"][key] for key in model} == model
    strategy = {
        "micro_batch_num": 8,
        "ep_size": 4,
        "pp_size": 2,
        "world_size": 8,
        "zero_state": 1,
        "cross_entropy_loss_fusion": True,
        "dispatch_probs": True,
    }
    assert {key: said["strategy"][key] for key in strategy} == strategy
    assert "recompute_granularity" not in said["strategy"]


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (MemoryConfig("full"), {"recompute_granularity": "full_block", "recompute_layer_num": 6}),
        (
            MemoryConfig("selective", recompute_modules=["layernorm", "mlp"]),
            {
                "recompute_granularity": "selective_recompute",
                "megatron_recompute_modules": ["layernorm", "mlp"],
            },
        ),
        (MemoryConfig("selective"), {"recompute_granularity": "sdp_only"}),
    ],
)
def test_recomputation_in_simumax_words(
    rows: dict[str, Case], memory: MemoryConfig, words: dict[str, object]
) -> None:
    config = replace(rows["simumax_llama3_70b_l12_tp1_pp2_dp4_mbc4_cef"].config, memory=memory)
    said = for_simumax.settings(config)["strategy"]
    assert {key: said[key] for key in words} == words


def test_replicas_in_llm_analysis_words(rows: dict[str, Case]) -> None:
    # Weights are gathered over its "sharded" ranks, so those are only ZeRO-3's.
    fsdp = for_llm_analysis.settings(rows["sc21_t2_7"].config)
    assert (fsdp["parallel"]["dp_size"], fsdp["parallel"]["rdp_size"]) == (384, 1)
    assert fsdp["training"]["ds_zero"] == 3
    whole = for_llm_analysis.settings(rows["sc21_t2_1"].config)
    assert (whole["parallel"]["dp_size"], whole["parallel"]["rdp_size"]) == (1, 4)
    assert whole["training"]["gradient_accumulation_steps"] == 384
    assert whole["training"]["activation_recomputation"] == 4
    assert whole["gpu"] == "a100-sxm-80gb"


def test_a_peers_time_in_the_rows_unit(rows: dict[str, Case]) -> None:
    for name in ("korth_1", "sc21_t2_1"):
        shared = share(rows[name])
        assert shared is not None
        assert shared.ours.predicted is not None
        same = in_row_unit(shared, shared.prediction.step_seconds, 1.0)
        assert same == pytest.approx(shared.ours.predicted)
        twice = in_row_unit(shared, 2 * shared.prediction.step_seconds, 1.0)
        ratio = 2.0 if shared.ours.is_time else 0.5
        assert twice == pytest.approx(ratio * shared.ours.predicted)


def test_everybody_has_words_for_the_sweep() -> None:
    layouts = sweep()
    assert len(layouts) == LAYOUTS
    for peer in PEERS:
        for words in peer.sweeps.values():
            assert len([words(layout) for layout in layouts]) == LAYOUTS


def test_the_sweep_as_arrays_is_the_sweep() -> None:
    layouts = sweep()[:8]
    together = evaluate(layouts[0], as_arrays(layouts))
    apart = [evaluate(layout, from_config(layout)) for layout in layouts]
    for name in ("step_seconds", "peak_memory_bytes"):
        single = [float(getattr(result, name)) for result in apart]
        assert len(set(single)) == len(layouts)
        np.testing.assert_allclose(getattr(together, name), single, rtol=1e-9)


def test_without_peers_it_says_where_to_get_them() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(PEERS)
    assert all("skipped" in line and "https://github.com/" in line for line in lines)
