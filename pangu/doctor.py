"""`python -m pangu.doctor [the arguments of pangu.train]`: what a run would meet, before it runs.

Every violation of the configuration, the process groups it resolves to, parameters per rank, and
the installation. Imports no torch and enumerates ten thousand ranks in a moment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, cast

from rich.table import Table
from rich.text import Text

from configs.check import examine, warnings
from configs.layout import layers_per_virtual_stage
from configs.process_groups import process_groups
from configs.schema import Config
from pangu import machine_check
from pangu.violation_table import console, print_violations, print_warnings
from simulator.parameters import (
    count_parameters,
    layer_parameters,
    mtp_extra,
    mtp_kind,
    norm_parameters,
)

GROUP_NAMES = {
    "tp": "tensor (TP)",
    "cp": "context (CP)",
    "dp": "data (DP)",
    "pp": "pipeline (PP)",
    "dp-cp": "gradients of the dense part (DP x CP)",
    "etp": "expert tensor (ETP)",
    "ep": "expert (EP)",
    "edp": "gradients of the experts (EDP)",
}


def main(arguments: Sequence[str]) -> int:
    """2 when there is something to mend, else 0. What the mistakes leave intact is still shown."""
    config, found = examine(list(arguments))
    if found:
        print_violations(found)
    broken = {violation.key.split(".")[0] for violation in found}
    members = 0
    if config is not None and broken.isdisjoint({"parallel", "launch", "devices"}):
        groups = process_groups(config)
        members = sum(len(kind[0]) > 1 for kind in groups.values())
        show_groups(config, groups)
        if "model" not in broken:
            show_parameters(config)
    if config is not None and not found:
        print_warnings(warnings(config))
    show_machine(config.backend.name if config else "auto")
    show_variables(config.launch.timeout_minutes if config else 10.0, members)
    return 2 if found else 0


def show_groups(config: Config, groups: dict[str, list[list[int]]]) -> None:
    """One row per kind of group. `reach`: whether its ranks share a node."""
    node = devices_per_node(config)
    title = f"{config.world_size} ranks" + (f", {node} per node" if node else "")
    table = Table(title=title, title_justify="left")
    for heading in ("process groups", "size", "groups", "that of rank 0", "reach"):
        table.add_column(heading)
    for name, members in groups.items():
        table.add_row(
            GROUP_NAMES[name],
            str(len(members[0])),
            str(len(members)),
            shortened(members[0]),
            reach(members, node),
        )
    console().print(table)


def shortened(ranks: Sequence[int], most: int = 6) -> str:
    """`[0, 8, 16, … 120]` for long groups."""
    if len(ranks) <= most:
        return ", ".join(map(str, ranks))
    return ", ".join(map(str, ranks[:3])) + f", … {ranks[-1]}"


def devices_per_node(config: Config) -> int:
    """From the machine preset or the launcher's processes; 0 where neither tells."""
    if config.hardware:
        return int(config.hardware.get("devices_per_node", 0))
    return config.launch.processes if config.launch.processes > 1 or not config.devices else 0


def reach(groups: list[list[int]], node: int) -> str:
    if len(groups[0]) == 1:
        return "-"
    if not node:
        return ""
    inside = all(group[0] // node == group[-1] // node for group in groups)
    return "one node" if inside else "between nodes"


def show_parameters(config: Config) -> None:
    """Totals, and what each pipeline rank holds; equal ranks share a row."""
    count = count_parameters(config)
    title = f"{config.model.name}: {_billions(count.total)} parameters, "
    title += f"{_billions(count.active)} active per token"
    title += f", {_billions(count.mtp)} for multi-token prediction beside" if count.mtp else ""
    table = Table(title=title, title_justify="left")
    for heading in ("pipeline ranks", "layers", "dense part", "experts", "parameters per rank"):
        table.add_column(heading, justify="left" if heading == "pipeline ranks" else "right")
    rows: dict[tuple[str, ...], list[int]] = {}
    row: tuple[str, ...]
    for rank, (layers, dense, experts) in enumerate(parameters_per_rank(config)):
        row = (layers, _billions(dense), _billions(experts), _billions(dense + experts))
        rows.setdefault(row, []).append(rank)
    for row, ranks in rows.items():
        table.add_row(shortened(ranks), *row)
    console().print(table)


def parameters_per_rank(config: Config) -> list[tuple[str, float, float]]:
    """Layers of each chunk, parameters outside experts and in experts, for each pipeline rank."""
    model, moe, p = config.model, config.moe, config.parallel
    pp, tp = p.pipeline_model_parallel_size, p.tensor_model_parallel_size
    sizes = (tp, p.expert_model_parallel_size, p.expert_tensor_parallel_size)
    dense_layers = model.num_dense_layers if model.num_experts else model.num_layers
    stages = layers_per_virtual_stage(config)
    table = model.vocab_size * model.hidden_size / tp
    found: list[list[Any]] = [[[], 0.0, 0.0] for _ in range(pp)]
    first = 0
    for stage, layers in enumerate(stages):
        rank = found[stage % pp]
        rank[0].append(str(layers))
        for layer in range(first, first + layers):
            kind = "dense" if layer < dense_layers else "moe"
            parts = layer_parameters(model, moe, cast(Any, kind), *sizes)
            rank[1] += float(parts.dense)
            rank[2] += float(parts.experts)
        first += layers
    # Embedding first, head last. Tied, the last stage of several holds a copy of the table.
    found[0][1] += table
    if model.position_embedding == "learned":
        found[0][1] += model.max_position_embeddings * model.hidden_size
    last = found[-1]
    last[1] += norm_parameters(model, model.hidden_size)
    if not model.tie_embeddings or pp > 1:
        last[1] += table
    if model.mtp_num_layers:
        parts = layer_parameters(model, moe, mtp_kind(model), *sizes)
        own = parts.dense + mtp_extra(model) - 2 * model.hidden_size**2 * (1 - 1 / tp)
        last[1] += float(model.mtp_num_layers * own)
        last[2] += float(model.mtp_num_layers * parts.experts)
    return [(" + ".join(chunks), dense, experts) for chunks, dense, experts in found]


def show_machine(requested: str) -> None:
    """Backend and versions, then what to mend."""
    name, why = machine_check.backend(requested)
    table = Table(title="This machine", title_justify="left", show_header=False)
    table.add_row("machine", machine_check.machine())
    table.add_row("backend", f"{name} ({why})")
    for package, version in machine_check.packages().items():
        optional = "-" if package not in machine_check.REQUIRED else "missing"
        table.add_row(package, version or optional)
    console().print(table)
    for sentence in machine_check.complaints(requested):
        console().print(Text(f"note: {sentence}"))


def show_variables(timeout_minutes: float, groups: int) -> None:
    """Ascend's environment variables, present and recommended; see `machine_check.variables`."""
    table = Table(title="Variables that NPUs read", title_justify="left")
    for heading in ("variable", "is", "start from", "what for"):
        table.add_column(heading, overflow="fold")
    rows = machine_check.variables(os.environ, timeout_minutes=timeout_minutes, groups=groups)
    for variable, value in rows:
        table.add_row(variable.name, value or "-", variable.recommended or "-", variable.why)
    console().print(table)


def _billions(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
