"""The planner's only door for `pangu`: what a run will take, what its model is, and what a machine
that was measured is like.

- before a run: `predict` (a `Forecast`), `pipeline_ranks` where no machine is named, `settle` for
  `memory=auto` (a `Policy`);
- behind MFU and reports: `model_flops_per_token`, `count_parameters`, `fill_page`, `serve_page`;
- for drafts: `decoding_seconds`, `active_experts`;
- for calibration: `Hardware` and its parts, `load_hardware`, `read_hardware`, `operator_seconds`,
  `count_layer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.schema import Config
from simulator import operators
from simulator.array import Array
from simulator.counts.records import Counts
from simulator.hardware import (
    Attention,
    Decoding,
    Hardware,
    Launch,
    Link,
    Matmul,
    Overlap,
    load_hardware,
    read_hardware,
)
from simulator.host import issue_seconds
from simulator.inference import decode_step
from simulator.layout import from_config
from simulator.memory_policy import Policy, settle
from simulator.moesd import active_experts
from simulator.page import fill as fill_page
from simulator.parameters import count_parameters, model_flops_per_token
from simulator.parts import Parts, prepare
from simulator.predict import Forecast, predict
from simulator.ranks import Rank, pipeline_ranks
from simulator.serving import serving

__all__ = [
    "Attention",
    "Decoding",
    "Forecast",
    "Hardware",
    "Launch",
    "LayerCount",
    "Link",
    "Matmul",
    "Overlap",
    "Policy",
    "Rank",
    "active_experts",
    "count_layer",
    "count_parameters",
    "decoding_seconds",
    "fill_page",
    "load_hardware",
    "model_flops_per_token",
    "operator_seconds",
    "pipeline_ranks",
    "predict",
    "read_hardware",
    "serve_page",
    "settle",
]

_SECONDS: dict[str, Callable[..., Any]] = {
    "matmul": operators.matmul_seconds,
    "grouped_matmul": operators.grouped_matmul_seconds,
    "attention": operators.attention_seconds,
}


def serve_page(port: int, get: Callable[[str], tuple[str, str]]) -> None:
    """Serve on this machine alone, until Ctrl-C: `get` turns a path into media type and text.

    Raises:
        ConfigError: the port cannot be listened on.
    """
    from simulator.local_server import LocalServer, serve  # http's own: only where it is served

    serve(port, lambda port: LocalServer(port, lambda address: get(address.path)))


def operator_seconds(hardware: Hardware, kind: str, *, dtype: str, **shape: Any) -> Any:
    """Seconds of one operator of `kind` (matmul, grouped_matmul, attention) and `shape` (names and
    units of `simulator.operators`; arrays broadcast) on `hardware`."""
    return _SECONDS[kind](hardware, **shape, dtype=dtype)


def decoding_seconds(
    config: Config, sequences: Array, tokens: Array = 1, *, context: Array | None = None
) -> Array:
    """Seconds of one decoding step of one copy of the model on the machine that `config` names.

    `tokens` new tokens of each of `sequences` sequences pass together, every sequence having
    `context` positions in the cache (null: the prompt and half of the output of
    `config.inference`). Arguments broadcast: a whole table of batches × draft lengths in one call.

    Raises:
        ConfigError: there is no machine, or the layout cannot serve.
    """
    layout = serving(config, load_hardware(config.hardware))
    if context is None:
        context = config.inference.mean_context
    return decode_step(layout, sequences, context, tokens).seconds


@dataclass(frozen=True)
class LayerCount:
    """How many operators and expert-exchange messages a micro-batch meets in one MoE layer, and
    operators at the model's ends (embedding, and head with the loss). Where a device of its own
    computes, operators are what its host calls (`simulator.host`)."""

    operators: float
    messages: int
    end_operators: float


def count_layer(config: Config) -> LayerCount:
    """Counts of one MoE layer of a configuration that names a machine.

    Raises:
        ConfigError: it names none.
    """
    parts = prepare(config, from_config(config))
    blocks = parts.blocks
    assert blocks.moe is not None, "calibration runs a model with experts"
    exchanged = (m for m in blocks.moe.messages if m.group in ("ep", "expert") and np.any(m.bytes))
    return LayerCount(
        _calls(parts, blocks.moe),
        int(sum(float(message.count) for message in exchanged)),
        _calls(parts, blocks.embedding) + _calls(parts, blocks.head),
    )


def _calls(parts: Parts, counts: Counts) -> float:
    if parts.hardware.backend == "cpu":
        return sum(1 for each in counts.operators if np.any(each.bytes) and each.count)
    issue = issue_seconds(parts.hardware, parts.shapes, counts)
    return float(issue.forward + issue.backward) * 1e6 / parts.hardware.launch_us.host
