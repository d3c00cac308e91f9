"""The table of published runs: its configurations, its errors, and what a bad table is told."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.violation import ConfigError
from simulator.__main__ import application
from simulator.parameters import model_flops_per_token
from simulator.predict import predict
from simulator.validation.engine import NotPredictable, case
from simulator.validation.measure import in_unit, outcome
from simulator.validation.rows import Outcome, summarise
from simulator.validation.split import split_of
from simulator.validation.table import COLUMNS, PACKAGED, Row, read_table
from simulator.validation.version import counts_half_the_square

ROWS = {row["id"]: row for row in read_table()}


def errors(source: str) -> list[float]:
    """Errors of the complete rows of a source."""
    found = [outcome(row, True) for row in ROWS.values() if source in row["source"]]
    return [x.error for x in found if x.error is not None and not x.is_memory]


def mean(values: list[float]) -> float:
    return sum(map(abs, values)) / len(values)


def test_table_is_complete() -> None:
    assert len(ROWS) == 599
    assert sum(not row["missing"] for row in ROWS.values()) == 336


def test_held_out_dense_runs_on_a100() -> None:
    found = errors("Korthikanti")
    assert len(found) == 8
    assert mean(found) < 0.03
    assert max(map(abs, found)) < 0.09


def test_single_node_b200_time_and_memory() -> None:
    held_out = [
        outcome(row, True)
        for row in ROWS.values()
        if "SimuMax" in row["source"]
        and "llama3-70b" not in row["model"]
        and "mbc32" not in row["id"]  # the same layouts with more micro-batches
    ]
    assert {x.split for x in held_out} == {"judged"}
    time = [x.error for x in held_out if not x.is_memory]
    memory = [x.error for x in held_out if x.is_memory]
    assert mean(time) < 0.05  # type: ignore[arg-type]
    assert mean(memory) < 0.01  # type: ignore[arg-type]


def test_a_row_becomes_the_run_it_describes() -> None:
    found = case(ROWS["zoo_q235_h100_2"])
    config = found.config
    assert config.world_size == 256
    assert config.num_microbatches == 128
    assert config.parallel.overlap_expert_parallel
    assert config.parallel.expert_model_parallel_size == 32
    assert config.memory.recompute_modules == ["layernorm", "moe_act"]
    assert config.hardware is not None
    assert config.hardware["name"] == "h100"
    plain = case(ROWS["korth_1"]).config
    assert not plain.parallel.sequence_parallel
    assert not plain.simulation.fused_attention
    assert plain.memory.recompute_granularity == "full"
    mla = case(ROWS["mcoremoe_4_tps"]).config
    assert (mla.model.kv_lora_rank, mla.model.mtp_num_layers) == (512, 1)
    assert mla.backend.precision == "fp8"
    sharded = case(ROWS["mpt_139"]).config
    assert sharded.parallel.zero_stage == 3
    assert sharded.hardware is not None
    assert sharded.hardware["memory_gib"] == 40.0
    with pytest.raises(NotPredictable, match="layers, hidden, heads not given"):
        case(ROWS["mbridge_26.06_36"])


def test_held_out_sharded_runs_of_2021() -> None:
    found = errors("SC21 arXiv:2104.04473 Table 2")
    assert len(found) == 12
    assert mean(found) < 0.07
    assert max(map(abs, found)) < 0.17


def test_held_out_runs_on_ascend() -> None:
    found = [
        outcome(row, True)
        for row in ROWS.values()
        if "MindSpeed-LLM" in row["source"] and split_of(row["source"], row["model"]) == "judged"
    ]
    assert mean([x.error for x in found if x.error is not None]) < 0.102
    refused = {x.id: x.reason for x in found if x.error is None}
    assert "not stated" in refused["ms_head_cp_ring"]


def test_what_published_scripts_say_and_tables_leave_out() -> None:
    def settings(name: str) -> tuple[bool, str, list[str]]:
        config = case(ROWS[name]).config
        overlap = config.parallel.overlap_expert_parallel
        return overlap, config.moe.dispatcher, config.memory.recompute_modules

    graphs = case(ROWS["mbridge_26.08_10"]).config
    assert graphs.parallel.overlap_expert_parallel
    assert graphs.moe.dispatcher == "deduplicated"
    assert graphs.memory.recompute_granularity == "none"
    assert settings("mbridge_26.04_119") == (False, "deduplicated", ["mla_up_proj"])
    assert settings("mbridge_25.09_252") == (False, "alltoall", ["mla_up_proj"])
    # overlap needs interleaved stages
    assert not settings("mbridge_26.06_25")[0]
    assert settings("mbridge_26.06_27")[0]
    report = case(ROWS["dsv3_report"]).config
    assert settings("dsv3_report") == (True, "deduplicated", ["layernorm", "mla_up_proj"])
    assert report.parallel.virtual_pipeline_model_parallel_size == 2
    assert (report.moe.num_expert_groups, report.moe.topk_group) == (8, 4)
    swapped = case(ROWS["ms_rc3_52"]).config
    assert not swapped.simulation.grouped_experts
    assert swapped.memory.recompute_modules == ["layernorm", "mlp", "moe"]
    assert case(ROWS["ms_rc3_2"]).config.simulation.fused_attention
    assert not case(ROWS["ms_rc3_8"]).config.simulation.fused_attention
    assert case(ROWS["sc21_t2_9"]).config.simulation.sharding == "deepspeed_2021"


def test_what_published_recipes_say_and_tables_leave_out() -> None:
    fused = case(ROWS["mbridge_26.06_34"]).config.simulation
    assert fused.fused_experts
    assert fused.fp8_attention
    sinks = case(ROWS["mbridge_26.06_27"]).config
    assert sinks.simulation.fused_experts
    assert not sinks.simulation.fp8_attention
    assert sinks.model.add_mlp_bias
    assert sinks.simulation.clamped_experts
    # every second layer attends to 128 tokens, of 2,048 in the mean
    assert sinks.simulation.attention_span == pytest.approx((1 + 128 / 2048) / 2)
    padded = [
        case(ROWS[f"mbridge_{row}"]).config.simulation.padded_experts
        for row in ("26.02_214", "26.04_130", "25.09_260", "26.02_204")
    ]
    assert padded == [True, False, False, False]  # HybridEP, dropped tokens, 16 bits
    early = case(ROWS["mbridge_25.11_230"]).config.simulation
    assert not early.fused_experts
    assert not early.fp8_attention


def test_recipes_without_captured_graphs() -> None:
    """No `cuda_graph_impl`: DeepSeek and GPT-OSS on B200, Qwen3-235B with the plain all-to-all."""
    for row, launch in (
        ("26.04_119", "eager"),
        ("26.04_121", "eager"),
        ("26.02_214", "eager"),
        ("26.04_120", "captured"),
        ("26.04_117", "captured"),
    ):
        assert case(ROWS[f"mbridge_{row}"]).config.simulation.launch == launch, row


def test_adapters_between_nodes_are_those_of_the_system() -> None:
    for row, gigabytes in (("25.11_237", 50), ("26.06_34", 50), ("26.06_25", 100)):
        machine = case(ROWS[f"mbridge_{row}"]).config.hardware
        assert machine is not None
        assert machine["links"][-1]["bandwidth_gbps"] == gigabytes
    single = case(ROWS["simumax_deepseekv2_tp1_ep8_pp1_dp8_l4_mbc4_cef"]).config.hardware
    assert single is not None
    assert single["links"][-1]["bandwidth_gbps"] == 100


def like(row: str, **cells: str) -> Row:
    """A row of the table with other cells."""
    changed = ROWS[row].cells | cells
    numbers = {name: int(text) for name, text in cells.items() if text.isdigit()}
    return Row(changed, ROWS[row].numbers | numbers, ROWS[row].measured)


def test_the_network_that_a_device_column_states_counts() -> None:
    for device, gigabytes in (
        ("A100-80GB SXM (4 x 100 Gb/s RoCE per node)", 6.25),
        ("A100-80GB SXM (400 Gbps per node)", 6.25),
        ("A100-40GB SXM (1600Gb/s RoCE per node)", 25.0),
        ("H200 (200Gb/s CX-7 per GPU)", 25.0),
        ("H100-80GB SXM (700W, RoCE 400G)", 50.0),  # says nothing of what shares it
    ):
        links = case(like("titan_t1_2", device=device)).config.hardware["links"]  # type: ignore[index]
        assert links[-1]["bandwidth_gbps"] == gigabytes, device
        assert links[0]["bandwidth_gbps"] > 200, device


def test_what_pytorch_engines_recompute() -> None:
    for words in ("selective layer", "selective op", "selective AC"):
        memory = case(like("titan_t1_2", recompute=words)).config.memory
        assert (memory.recompute_method, memory.recompute_num_layers) == ("block", 16), words
    assert case(like("titan_t1_2", recompute="no")).config.memory.recompute_granularity == "none"
    mixed = next(row for row in ROWS.values() if row.mentions("mixed precision DEFAULT"))
    assert case(mixed).config.simulation.recompute_stops_early
    assert case(ROWS["titan_t4_1"]).config.simulation.recompute_stops_early
    assert not case(ROWS["mpt_167"]).config.simulation.recompute_stops_early  # PyTorch 1.13


def test_kernels_written_for_an_older_machine() -> None:
    """335 TFLOP/s on H100 for 203 on A100: little more than half the part of the peak."""
    older = case(ROWS["mpt_167"]).config.hardware
    newer = case(like("mpt_167", device="H100-80GB SXM")).config.hardware
    assert older is not None
    assert newer is not None
    part = newer["attention"]["forward"] / older["attention"]["forward"]
    assert part == pytest.approx(335 / 203 * 312 / 989)
    assert newer["memory_efficiency"] == older["memory_efficiency"]
    assert newer["matmul"] == case(ROWS["mlm_h100_1"]).config.hardware["matmul"]  # type: ignore[index]


def test_a_sliding_window_is_attended_alone() -> None:
    windowed = like("ms_rc3_11", model="Mistral-7B", seq="32768")
    assert case(windowed).config.simulation.attention_span == pytest.approx(1 / 8 * (2 - 1 / 8))
    stated = like("ms_rc3_11", notes=ROWS["ms_rc3_11"]["notes"] + "; sliding window 8192")
    assert case(stated).config.simulation.attention_span == pytest.approx(1 / 4 * (2 - 1 / 4))
    assert case(ROWS["ms_rc3_11"]).config.simulation.attention_span == 1.0


def test_units() -> None:
    slow = Outcome("a", "s", "step_time_s", 2.0, 2.2, "judged")
    rate = Outcome("b", "s", "tokens_per_s_per_GPU", 100.0, 80.0, "calibrated")
    assert slow.error == pytest.approx(0.1)
    assert rate.error == pytest.approx(-0.2)
    assert rate.time_error == pytest.approx(0.25)
    whole = summarise([slow, rate])[0]
    assert (whole.rows, whole.split) == (2, "both")
    assert whole.mean_error == pytest.approx(0.15)
    assert whole.bias == pytest.approx(-0.05)
    assert [x.split for x in summarise([slow, rate], by_split=True)] == ["judged", "calibrated"]


def test_split_keeps_families_apart() -> None:
    folding = "MoE Parallel Folding arXiv:2504.14960 Table 3 (=Table 1)"
    assert split_of(folding, "Mixtral-8x22B") == "calibrated"
    assert split_of(folding, "Mixtral-8x22B-G8T8") == "judged"
    assert split_of("Korthikanti et al. 2022", "GPT-22B") == "judged"
    assert split_of("a table of a user's", "LLaMA2-7B") == "judged"


def written(path: Path, rows: list[Row], **changes: str) -> Path:
    further = [name for name in changes if name not in COLUMNS]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *further])
        writer.writeheader()
        for row in rows:
            writer.writerow(row.cells | changes)
    return path


def test_model_flops_are_counted_as_the_engine_counted_them() -> None:
    """PaLM's formula: 6 per parameter that is used, and 12·layers·heads·head size·sequence for
    the whole square of attention; half of that since megatron-core 0.12."""
    older = case(ROWS["folding_t5_MCorewFolding_1024"])
    newer = case(ROWS["zoo_q235_ctx65536_forced"])
    for found, half in ((older, False), (newer, True)):
        m = found.config.model
        result = predict(found.config)
        square = 12 * m.num_layers * m.num_attention_heads * 128 * found.config.train.seq_length
        both = [model_flops_per_token(found.config, causal=causal) for causal in (True, False)]
        assert both[1] - both[0] == pytest.approx(square / 2, rel=1e-3)
        rate = result.tokens_per_second_per_device * (both[0] if half else both[1]) / 1e12
        unit = 100 / 989.5 if found is older else 1
        assert in_unit(found, result) == pytest.approx(rate * unit, rel=1e-6)


@pytest.mark.parametrize(
    ("version", "notes", "half"),
    [
        ("0.12.1", "", True),
        ("0.11", "", False),
        ("", "Megatron-LM 0.14, fused CE", True),
        ("", "mcore v0.9", False),
        ("", "NeMo 25.09 container", True),
        ("", "NeMo 24.07", False),
        ("0.11", "Megatron-LM 0.14", False),  # the column counts
        ("", "", False),
    ],
)
def test_the_version_of_an_engine(version: str, notes: str, half: bool) -> None:
    row = like("korth_1", notes=notes)
    assert counts_half_the_square(replace(row, core_version=version)) is half


@pytest.mark.parametrize(
    ("notes", "overlap"),
    [
        ("dropless; A2A overlap", True),
        ("DeepEP; A2A overlap off", False),
        ("DeepEP; without A2A overlap", False),
        ("all-to-all overlap; HybridEP", True),
        ("dispatcher DeepEP;", False),
    ],
)
def test_overlap_named_in_a_rows_notes(notes: str, overlap: bool) -> None:
    parallel = case(like("zoo_q235_h100_2", notes=notes)).config.parallel
    assert parallel.overlap_expert_parallel is overlap


def test_unknown_words_for_recomputation_are_named() -> None:
    for words, unknown in (
        ("selective: frobnicate moe_act", "'frobnicate'"),
        ("some", "'some'"),
        ("full flux", "'flux'"),
    ):
        with pytest.raises(NotPredictable, match=unknown):
            case(like("zoo_q235_h100_2", recompute=words))
    for words, modules in (
        ("selective", ["core_attn"]),
        ("selective (attention core) + sequence parallel", ["core_attn"]),
        ("selective: norm, act", ["layernorm", "moe_act"]),
        ("selective: RMSNorm and MLA up-projections", ["layernorm", "mla_up_proj"]),
    ):
        memory = case(like("zoo_q235_h100_2", recompute=words)).config.memory
        assert memory.recompute_modules == modules, words
    listed = case(like("zoo_q235_h100_2", recompute="none listed")).config.memory
    assert listed.recompute_granularity == "none"


def test_a_run_that_is_forecast_not_to_fit_is_marked() -> None:
    crowded = outcome(like("korth_1", micro_batch="64", global_batch="64"), False)
    assert not crowded.fits
    assert crowded.error is not None
    assert "not to fit" in crowded.remarks
    assert outcome(ROWS["korth_1"], True).fits
    assert "not to fit" not in outcome(ROWS["korth_1"], True).remarks


def test_a_table_may_declare_its_engine(tmp_path: Path) -> None:
    row = ROWS["korth_1"]
    changes = {
        "simulation.fused_attention": "true",
        "parallel.sequence_parallel": "true",
        "memory.recompute_granularity": "none",
        "hardware.memory_efficiency": "0.5",
        "core_version": "0.13",
        "my own remarks": "ignored",
    }
    declared = read_table(written(tmp_path / "own.csv", [row], **changes))[0]
    config = case(declared).config
    assert config.simulation.fused_attention
    assert config.parallel.sequence_parallel
    assert config.memory.recompute_granularity == "none"
    assert config.hardware is not None
    assert config.hardware["memory_efficiency"] == 0.5
    assert counts_half_the_square(declared)
    assert not case(row).config.simulation.fused_attention
    blank = read_table(written(tmp_path / "blank.csv", [row], **dict.fromkeys(changes, "")))[0]
    assert case(blank).config == case(row).config


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("simulation.fused_attenton", "true", "simulation.fused_attenton.*no such key"),
        ("simulation.fused_attention", "perhaps", "simulation.fused_attention.*perhaps"),
        ("parallel.zero_stage", "[", "not a value"),
    ],
)
def test_impossible_declarations_are_reasons(column: str, value: str, sentence: str) -> None:
    found = outcome(replace(ROWS["korth_1"], declared={column: value}), False)
    assert found.error is None
    assert re.search(sentence, found.reason)


def test_command_predicts_a_table_of_ones_own(tmp_path: Path) -> None:
    rows = [ROWS["korth_2"], ROWS["mbridge_26.06_36"]]
    table = written(tmp_path / "more.csv", rows)
    plot = tmp_path / "plot.png"
    arguments = ["validate", "--table", str(table), "--json", "--plot", str(plot), "--split"]
    result = CliRunner().invoke(application(["validate"]), arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    first, second = printed["rows"]
    assert first["measured"] == 1.1
    assert first["error"] == pytest.approx(first["predicted"] / 1.1 - 1)
    assert first["split"] == "judged"
    assert second["error"] is None
    assert "layers" in second["reason"]
    source = printed["sources"][0]
    assert {"source", "rows", "mean_error", "median_error", "max_error", "bias"} <= set(source)
    assert source["mean_error"] == pytest.approx(abs(first["error"]))
    assert printed["calibration"]
    assert plot.stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden": "nan"}, "hidden is 'nan'"),
        ({"tp": "-8"}, "tp is '-8'"),
        ({"value": "nan"}, "the measured value is nan"),
        ({"value": "0"}, "is not positive"),
        ({"global_batch": "2.5"}, "global_batch is '2.5'"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_table(written(tmp_path / "bad.csv", [ROWS["korth_1"]], **changes))
    assert len(caught.value.violations) == 1


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    lacking = tmp_path / "lacking.csv"
    lacking.write_text("id,source\n1,me\n")
    with pytest.raises(ConfigError, match="lacks the columns model, layers"):
        read_table(lacking)
    with pytest.raises(ConfigError, match="no rows"):
        read_table(written(tmp_path / "empty.csv", []))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_table(tmp_path / "none.csv")
    assert PACKAGED.is_file()


def test_what_engines_of_a_time_ran() -> None:
    def traits(row: str):
        return case(ROWS[row]).config.simulation

    assert traits("nemo2407_LLAMA3-8B_8").flash_attention_2
    assert traits("titan_h200_4n").flash_attention_2
    assert not traits("mbridge_26.02_189").flash_attention_2
    assert traits("mbridge_26.08_10").launch == "captured"
    assert traits("mbridge_26.04_129").launch == "eager"
    assert traits("mbridge_26.04_129").host_reads_counts
    assert not traits("folding_t3_9").host_reads_counts  # every expert has its capacity
    assert not traits("vtrain_single_26").host_reads_counts
    early = case(ROWS["vtrain_single_26"]).config
    assert not early.parallel.sequence_parallel
    assert early.parallel.zero_stage == 0
    assert not early.simulation.fp32_gradients
    assert not early.simulation.fused_attention
    assert not early.simulation.gradient_accumulation_fusion


def test_which_routers_are_balanced() -> None:
    def moe(row: str):
        return case(ROWS[row]).config.moe

    assert moe("zoo_q235_ctx16384_dropless").router == "top_k"
    assert moe("zoo_q235_ctx16384_forced").router == "forced_balance"
    assert moe("mbridge_25.09_249").router == "forced_balance"  # tokens are dropped
    assert moe("ms_head_dsv3_A3").expert_bias
