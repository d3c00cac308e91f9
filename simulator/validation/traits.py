"""Which traits the engine behind a row had."""

from __future__ import annotations

import re
from typing import Literal

from configs.planning import SimulationConfig
from simulator.validation.machines import precision
from simulator.validation.recipes import recipe
from simulator.validation.table import Row
from simulator.validation.version import attends_with_flash_2

WINDOWS = {"Mistral-7B": 4096}  # keys that a token attends to
# Their scripts run scores, mask, softmax and sum one by one.
WITHOUT_FLASH = ("Bloom", "Baichuan-13B")
# Microsoft's fork of Megatron in 2022: unfused attention, no sequence parallelism, float16
# gradients reduced whole, pipeline sends cut over tensor-parallel ranks.
DEEPSPEED = "Megatron-DeepSpeed"
# Float8 with a scale for every row or column: each operand is cast along both from 16 bits, by
# compiled kernels (calibrated, see simulator.validation.split); products are as fast as with one
# scale per tensor (pull request 2185 of pytorch/ao, TP 8 shapes of Llama 70B).
ROWWISE_CASTS = 4.3
DROPPED = ("CF=1", "token drop", "token-drop", "tokendrop")


def traits(row: Row) -> SimulationConfig:
    published = recipe(row)
    early = row.mentions("SC21 arXiv", "Korthikanti", DEEPSPEED)
    # MindSpeed's scripts from before megatron-core: no fused kernels, no flash attention.
    legacy = row.mentions("script examples/") and not row.mentions("script examples/mcore")
    eager = legacy or "Gemma2" in row["model"] or row.mentions("; eager")
    transformer_engine = row.mentions(
        "SimuMax", "Megatron-Bridge", "NeMo", "ModelZoo", "Megatron Core", "Folding", "Megatron-LM"
    )
    notes = row["notes"].lower()
    fused = any(word in notes for word in ("mc2 (", "coc overlap", "async tp", "asynctp"))
    fused = fused or "tp-comm-overlap" in notes or row["notes"].startswith("MegaScale")
    return SimulationConfig(
        transformer_engine=transformer_engine and not early,
        # Gemma 2 caps its attention scores between the two products.
        fused_attention=not (early or row["model"].startswith(WITHOUT_FLASH)),
        flash_attention_2=attends_with_flash_2(row),
        fused_kernels=not eager,
        padded_values=row.mentions("MindSpeed-LLM tag v1.0"),
        fused_cross_entropy=row.mentions(
            "fused CE", "SimuMax", "llm-foundry", "Megatron-Bridge", "NeMo", "Megatron Core"
        ),
        # MindSpeed's scripts name the flag.
        grouped_experts=not row.mentions("script examples/") or row.mentions("moe-grouped-gemm"),
        fused_experts=published is not None and published.fused,
        padded_experts=_pads(row),
        clamped_experts=gpt_oss(row),
        # llm-foundry's tables in pure bfloat16 are of PyTorch 1.13, in mixed precision of 2.1.
        recompute_stops_early=row.mentions("torchtitan", "mixed precision DEFAULT"),
        fp32_gradients=not (early or row.mentions("mixed precision PURE", "Bridge", "FSDP on")),
        launch=_launch(row),
        layer_overlap=False,
        host_reads_counts=row.number("n_experts") > 0 and not row.mentions(*DROPPED),
        inplace_cross_entropy=False,
        chunked_cross_entropy=False,
        # `LanguageCrossEntropy` and `LanguagePerplexity` of every batch, each a cross-entropy
        # of its own (llmfoundry/models/mpt/modeling_mpt.py, composer/metrics/nlp.py).
        loss_metrics=2 if row.mentions("llm-foundry") else 0,
        torch_kernels=False,
        expert_streams=True,
        gradient_accumulation_fusion=not row.mentions("SC21 arXiv", "llm-foundry", DEEPSPEED),
        scatter_gather_sends=early,
        parallel_block=row.mentions("parallel block"),
        overlap_sends=not before_overlap(row),
        sharding="deepspeed_2021" if row.mentions("SC21 arXiv") else "fsdp",
        attention_span=_attention_span(row),
        fp8_attention=published is not None and published.fp8_attention,
        balanced_context=not row.mentions("torchtitan"),
        node_forwarding=forwards(row),
        tp_comm_overlap=fused or row.mentions("Megatron-Bridge", "NeMo"),
        tp_gradient_overlap=not row.mentions("torchtitan", "Llama 3 Herd"),
        # torchtitan's `apply_tp` gathers in float8 under tensor-wise scaling alone.
        fp8_gathers=row.mentions("torchtitan") and "rowwise" not in row["precision"],
        fp8_cast_passes=ROWWISE_CASTS if "rowwise" in row["precision"] else 1.0,
    )


def _launch(row: Row) -> Literal["eager", "captured"]:
    """Megatron-Bridge's recipes capture graphs on Blackwell, with exceptions, not on Hopper."""
    published = recipe(row)
    blackwell = re.search(r"B[23]00", row["device"]) is not None
    bridge = published is not None and blackwell and not published.eager
    return "captured" if bridge or row.mentions("CUDA graph") else "eager"


def forwards(row: Row) -> bool:
    published = recipe(row)
    return not published.flat if published else row.mentions("DeepEP", "HybridEP", "DualPipe")


def _pads(row: Row) -> bool:
    """Megatron-Bridge's recipes leave `moe_router_padding_for_fp8` off. HybridEP pads as it
    dispatches, and dropping tokens leaves every expert a whole capacity."""
    published = recipe(row)
    dropped = row.mentions("token drop")
    return bool(published and published.flat and precision(row) in ("fp8", "fp4") and not dropped)


def before_overlap(row: Row) -> bool:
    """MegaScale's baseline: Megatron of early 2023 (commit 285068c8), to which the paper adds the
    overlap of pipeline sends, gradients and parameters as its own (arXiv 2402.15627, table 3)."""
    return row.mentions("MegaScale NSDI") and row["notes"].startswith("Megatron-LM")


def _attention_span(row: Row) -> float:
    if gpt_oss(row):
        return (1.0 + min(2.0 * 128 / row.number("seq"), 1.0)) / 2
    stated = re.search(r"sliding window (\d+)", row["notes"])
    window = int(stated.group(1)) if stated else WINDOWS.get(row["model"], 0)
    if 0 < window < row.number("seq"):
        part = window / row.number("seq")
        return part * (2.0 - part)
    return 0.3 if row.mentions("pack mode") else 1.0


def gpt_oss(row: Row) -> bool:
    """Biases everywhere, clamped experts, and in every second layer a window of 128 tokens."""
    return re.match(r"gpt.oss", row["model"], re.IGNORECASE) is not None
