"""Which published rows the presets' general constants were calibrated on.

By source and model family, never by row. A constant is never fitted to the rows it is judged on:
everything that no rule names is judged, and so is every row of a table that a user brings. The
list was written before any error was looked at and widened once, by families for effects that the
first list had no row of: many narrow experts (Qwen2-57B, Qwen3-30B on Ascend) and row-wise float8
(the 8B rows of the asynchronous tensor-parallel table). The 36 rows of one node are all for the
host's rate; runs of the same study that a user brings are judged. Runs with a real router beside
the same with forced balance (the ModelZoo's) are for the popularity of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["calibrated", "judged"]


@dataclass(frozen=True)
class Rule:
    """Rows whose source and model contain these texts set `constants`."""

    source: str
    models: tuple[str, ...]
    constants: str


CALIBRATION = (
    Rule("SC21 arXiv:2104.04473 Table 1", (), "a100: memory efficiency, launch, inter-node links"),
    Rule("llm-foundry", ("MPT-1b", "MPT-7b"), "a100: attention, sharded weights"),
    Rule("SimuMax", ("llama3-70b",), "b200: matrix and memory efficiency, attention"),
    Rule("Megatron-LM README", (), "h100: matrix and memory efficiency, attention"),
    Rule("Parallel Folding", ("Mixtral-8x22B", "Qwen2-57B"), "h100: expert products and exchange"),
    Rule("llama3_h100_202412", ("Llama-3.1-8B",), "h100_96g: matrix efficiency at 500 W, float8"),
    Rule("asyncTP_llama3", ("Llama-3.1-8B",), "h100_96g: fused overlap; row-wise float8"),
    Rule(
        "Megatron-Bridge",
        ("LLAMA3_70B",),
        "h100, gb200, gb300: fp8; gb200, gb300: fp4, in_training",
    ),
    Rule("MindSpeed-LLM tag", ("LLaMA", "CodeLlama"), "ascend_910b_376t: dense efficiencies"),
    Rule("qwen3/readme.md (long context)", (), "popularity of experts"),
    Rule("mixtral/run_mixtral_8x22B.sh", (), "popularity of experts"),
    Rule("vTrain data/ground_truth_single", (), "a100: what the host takes to issue a layer"),
    Rule("MindSpeed-LLM master", ("Qwen3-30B",), "ascend_910b_376t: expert exchange"),
)


def split_of(source: str, model: str) -> Split:
    """Whether a row of the packaged table was used to calibrate. `Mixtral-8x22B-G8T8` is another
    family than `Mixtral-8x22B`."""
    for rule in CALIBRATION:
        named = not rule.models or any(_same_family(model, name) for name in rule.models)
        if rule.source in source and named:
            return "calibrated"
    return "judged"


def _same_family(model: str, name: str) -> bool:
    return model.startswith(name) and not model.removeprefix(name).startswith("-G")
