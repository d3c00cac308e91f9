"""What a published run recomputed, from the words of its row, its notes and its recipe."""

from __future__ import annotations

import re

from configs.schema import MemoryConfig
from simulator.validation.machines import NotPredictable
from simulator.validation.recipes import recipe
from simulator.validation.table import Row

NOTHING = ("none", "none listed", "no", "off", "false")
# What is recomputed selectively, in the words of tables, papers and engines.
MODULES = (
    (r"mla[ _]up[-_ ]?proj(ections?)?", "mla_up_proj"),
    (r"attention core|core[ _]attn|core attention", "core_attn"),
    (r"shared[ _]experts?", "shared_experts"),
    (r"(rms|layer)?norms?", "layernorm"),
    (r"moe[ _]act(ivations?)?|act(ivations?)?", "moe_act"),
    (r"mlp", "mlp"),
    (r"moe", "moe"),
)
# Words that say nothing of what is recomputed. The last is MindSpeed's, beside whole layers.
FILLERS = (
    "selective full and of the config default no sequence parallel uniform block ac checkpointing"
    " activation recompute recomputation all every layers layer recompute-activation-function"
)


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
    """The row's recomputation in the configuration's words; none where nothing says.

    Raises:
        NotPredictable: it has words that are not known.
    """
    text = recompute_words(row)
    if text in ("", *NOTHING):
        return MemoryConfig()
    if "sac" in text or text.startswith(("selective ac", "selective layer", "selective op")):
        # torchtitan recomputes every second layer; or every second matrix product and all
        # elementwise operators, which is as much.
        half = row.number("layers") // (2 * row.number("pp", 1) * row.number("vpp", 1))
        return MemoryConfig(
            recompute_granularity="full", recompute_method="block", recompute_num_layers=half
        )
    modules, unknown = _modules(text)
    if unknown or not text.startswith(("full", "selective")):
        words = ", ".join(unknown) or text
        raise NotPredictable(
            f"recompute '{text}': '{words}' is not known; none, full, full/block/N or selective:"
            f" with {', '.join(dict.fromkeys(module for _, module in MODULES))}"
        )
    if text.startswith("full"):
        block = re.search(r"block/(\d+)", text)
        if block:
            return MemoryConfig(
                recompute_granularity="full",
                recompute_method="block",
                recompute_num_layers=int(block.group(1)),
            )
        return MemoryConfig(recompute_granularity="full")
    # "selective" alone is Megatron's --recompute-activations: the core of attention.
    return MemoryConfig(
        recompute_granularity="selective",
        recompute_modules=modules or ["core_attn"],  # type: ignore[arg-type]
    )


def _modules(text: str) -> tuple[list[str], list[str]]:
    """Modules that a text names, and its words that are not known."""
    found = []
    rest = text
    for pattern, module in MODULES:
        rest, count = re.subn(rf"(?<![\w-])(?:{pattern})(?![\w-])", " ", rest)
        if count:
            found.append(module)
    words = re.findall(r"[a-z_][\w-]*", rest)
    return sorted(found), [word for word in words if word not in FILLERS.split()]
