"""A configuration and this machine, as the tables that `pangu.doctor` prints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table
from rich.text import Text

from configs.layout import ranks_per_node
from configs.schema import Config
from pangu import machine_check
from pangu.preflight import precision
from pangu.violation_table import console
from simulator.api import Rank, count_parameters, pipeline_ranks

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


def show_groups(config: Config, groups: dict[str, list[list[int]]]) -> None:
    """One row per kind of group. `reach`: whether its ranks share a node."""
    node = ranks_per_node(config)
    ranks = f"{config.world_size} rank" + ("s" if config.world_size > 1 else "")
    title = ranks + (f", {node} per node" if node else "")
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
    return ", ".join(map(str, ranks[: most // 2])) + f", … {ranks[-1]}"


def reach(groups: list[list[int]], node: int) -> str:
    if len(groups[0]) == 1:
        return "-"
    if not node:
        return ""
    inside = all(group[0] // node == group[-1] // node for group in groups)
    return "one node" if inside else "between nodes"


def show_parameters(config: Config) -> None:
    """Totals, and what each pipeline rank holds; ranks with equal parts share a row."""
    count = count_parameters(config)
    title = f"{config.model.name}: {_billions(count.total)} parameters, "
    title += f"{_billions(count.active)} active per token"
    if not config.model.tie_embeddings:
        one_less = count.parts["embedding"]  # some papers count one of the two
        one = f"{_billions(count.total - one_less)} and {_billions(count.active - one_less)}"
        title += f" ({one} with one vocabulary table)"
    title += f", {_billions(count.mtp)} for multi-token prediction beside" if count.mtp else ""
    config = replace(config, backend=replace(config.backend, precision=precision(config)))
    table = Table(title=title, title_justify="left")
    table.add_column("pipeline ranks")
    for heading in ("layers", "dense", "experts", "total"):
        table.add_column(heading, justify="right")
    for heading in ("weights", "gradients", "optimizer", "activations", "peak"):
        table.add_column(heading, justify="right")
    alike: dict[tuple[str, ...], list[Rank]] = {}
    for rank in pipeline_ranks(config):
        alike.setdefault(held(rank), []).append(rank)
    for cells, members in alike.items():
        fullest = max(members, key=lambda rank: float(rank.memory.peak))
        ranks = shortened([rank.rank for rank in members], most=3)
        table.add_row(ranks, *cells, *gibibytes(fullest))
    table.caption = "per rank: parameters, and the simulator's forecast of the fullest in GiB, "
    table.caption += config.backend.precision
    console().print(table)


def held(rank: Rank) -> tuple[str, ...]:
    """Layers and parameters of a pipeline rank, as cells of a table."""
    parameters = (rank.parameters.dense, rank.parameters.experts, rank.parameters.total)
    return " + ".join(map(str, rank.layers)), *(_billions(float(n)) for n in parameters)


def gibibytes(rank: Rank) -> tuple[str, ...]:
    """Its memory, as cells of a table."""
    m = rank.memory
    parts = (m.weights, m.gradients, m.optimizer, m.activations + m.temporary, m.peak)
    return tuple(f"{float(value) / 2**30:.2f}" for value in parts)


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
