"""What a published run recomputed, from the words of its row, its notes and its recipe."""

from __future__ import annotations

import re

from configs.schema import MemoryConfig
from simulator.validation.recipes import recipe
from simulator.validation.table import Row


def recompute_words(row: Row) -> str:
    """What a run recomputes, in the words of the table's column; "" where nothing says."""
    if row.mentions("swap-attention"):  # MindSpeed: attention to the host, the rest again
        return "selective: layernorm mlp moe"
    if row.mentions("Llama 3 Herd") and row.number("seq") <= 8192:
        return "none"  # section 3.3.2: 8K tokens without activation checkpointing
    said = re.search(r"recompute of ([^;]+)", row["notes"])
    published = recipe(row)
    if row["recompute"]:
        return row["recompute"].lower()
    if said:
        return f"selective: {said.group(1)}".lower()
    return published.recompute if published else ""


def memory_policy(row: Row) -> MemoryConfig:
    """The row's recomputation in the configuration's words; none where nothing says."""
    text = recompute_words(row)
    if text.startswith("full/block"):
        layers = int(re.findall(r"\d+", text)[0])
        return MemoryConfig(
            recompute_granularity="full", recompute_method="block", recompute_num_layers=layers
        )
    if text.startswith("full"):
        return MemoryConfig(recompute_granularity="full")
    if "sac" in text or text.startswith(("selective ac", "selective layer", "selective op")):
        # torchtitan recomputes every second layer; or every second matrix product and all
        # elementwise operators, which is as much.
        half = row.number("layers") // (2 * row.number("pp", 1) * row.number("vpp", 1))
        return MemoryConfig(
            recompute_granularity="full", recompute_method="block", recompute_num_layers=half
        )
    if not text.startswith("selective"):
        return MemoryConfig()
    words = {
        "attention core": "core_attn",
        "norm": "layernorm",
        "mla_up_proj": "mla_up_proj",
        "mla up-projections": "mla_up_proj",
        "moe_act": "moe_act",
        "act": "moe_act",
        "mlp": "mlp",
        "moe": "moe",
    }
    parts = re.split(r"[\s,:()]+", text)
    modules = [
        module
        for word, module in words.items()
        if word in parts or (" " in word and word in text) or (word == "norm" and "norm" in text)
    ]
    return MemoryConfig(
        recompute_granularity="selective",
        recompute_modules=list(dict.fromkeys(modules)),  # type: ignore[arg-type]
    )
