"""What the published recipes of Megatron-Bridge say that its tables leave out.

Its performance tables point to recipes (scripts/performance, later perf_recipes, at the tag of each
release) for what is recomputed and whether expert communication runs beside another micro-batch.
They differ by model, machine, precision and release; the first line that applies counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from simulator.validation.table import Row


@dataclass(frozen=True)
class Recipe:
    """Patterns that a row must match, releases from `since` to before `until`, and what ran."""

    model: str
    device: str = ""
    precision: str = ""
    since: float = 0.0
    until: float = 99.0
    recompute: str = "none"  # in the words of the table's column
    overlap: bool = False  # expert exchange beside another micro-batch
    flat: bool = False  # plain all-to-all instead of DeepEP or HybridEP
    fused: bool = False  # fused_experts: `cutedsl_fused_grouped_mlp`
    fp8_attention: bool = False
    eager: bool = False  # on Blackwell: no `cuda_graph_impl` (tags v0.2.0 to v0.5.0)


UP = "selective: mla_up_proj"
ACT = "selective: layernorm moe_act"
RECIPES = (
    Recipe("DeepSeek", "GB300", "MXFP8", 26.06, overlap=True, fused=True, fp8_attention=True),
    Recipe("DeepSeek", "GB200", "MXFP8", 26.06, recompute=UP, overlap=True, fused=True),
    Recipe("DeepSeek", "B300", "MXFP8", 26.06, recompute=UP, overlap=True),
    Recipe("DeepSeek", "GB300", "BF16", recompute="selective: moe_act"),
    Recipe("DeepSeek", "GB200", "FP8", 26.04, 26.06, recompute="selective: mlp"),
    Recipe("DeepSeek", "H100", until=26.02, recompute=f"{UP} mlp", overlap=True),
    # The container of 26.02 has no DeepEP (known issues of the release).
    Recipe("DeepSeek", "H100", until=26.04, recompute=f"{UP} mlp", flat=True),
    Recipe("DeepSeek", "H100", recompute=f"{UP} mlp"),
    Recipe("DeepSeek", "-B200", until=26.02, recompute=UP, flat=True, eager=True),
    Recipe("DeepSeek", "-B200", recompute=UP, eager=True),
    Recipe("DeepSeek", "-B300", until=26.06, recompute=UP, eager=True),
    Recipe("DeepSeek", recompute=UP),
    Recipe("Kimi", "GB", recompute=UP),
    Recipe("Kimi", "H100", recompute=f"{UP} mlp", flat=True),
    Recipe("Kimi", recompute=UP, flat=True),
    # Float8 attention is on, but TransformerEngine has it for neither sinks nor windows.
    Recipe("GPT.OSS", "GB", "MXFP8", 26.06, overlap=True, fused=True),
    Recipe("GPT.OSS", "GB200", since=26.04, recompute=ACT, overlap=True, eager=True),
    Recipe("GPT.OSS", "GB200|B200", until=26.04, recompute=ACT, flat=True, eager=True),
    Recipe("GPT.OSS", "H100", recompute=ACT, flat=True),
    Recipe("GPT.OSS", "B200", recompute=ACT, eager=True),
    Recipe("GPT.OSS", "B300", until=26.04, flat=True),
    Recipe("GPT.OSS"),
    Recipe("Qwen3", "B[23]00", "MXFP8", 26.06, overlap=True, fused=True, fp8_attention=True),
    Recipe("Qwen3.235B", "GB"),
    Recipe("Qwen3.235B", "B300", since=26.06),
    Recipe("Qwen3.235B", "B300", until=26.04, overlap=True, flat=True, eager=True),
    Recipe("Qwen3.235B", "H100", overlap=True, flat=True),
    Recipe("Qwen3.235B", "-B200", until=26.02, overlap=True, flat=True, eager=True),
    Recipe("Qwen3.235B", flat=True, eager=True),
    Recipe("Qwen3.30B", "-B200", until=26.02, flat=True, eager=True),
    Recipe("Qwen3.30B", "H100", until=26.04, overlap=True, flat=True),
    Recipe("Qwen3"),
    # Fully sharded, the recipes send activations to the host rather than recompute them.
    Recipe("LLAMA"),
)


def recipe(row: Row) -> Recipe | None:
    """The recipe behind a row of Megatron-Bridge's tables; None for other sources."""
    release = re.search(r"NeMo (\d+\.\d+)", row["notes"])
    if "Megatron-Bridge" not in row["source"] or not release:
        return None
    return next((each for each in RECIPES if _applies(each, row, float(release.group(1)))), None)


def _applies(each: Recipe, row: Row, release: float) -> bool:
    return (
        re.match(each.model, row["model"], re.IGNORECASE) is not None
        and re.search(each.device, row["device"]) is not None
        and re.search(each.precision, row["precision"]) is not None
        and each.since <= release < each.until
        # megatron-core overlaps across micro-batches only where stages interleave.
        and (not each.overlap or row.number("pp", 1) == 1 or row.number("vpp", 1) > 1)
    )
