"""`python -m simulator shape`: which shape of a model a machine likes."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.commands import values, wide_console
from simulator.plot_file import must_be_drawable

if TYPE_CHECKING:
    from configs.schema import Config
    from simulator.shape import Shape, ShapeResult


class Goal(Enum):
    """What a shape is good for."""

    inference = "inference"
    training = "training"


def shape(
    overrides: Annotated[
        list[str],
        typer.Argument(help="model=… hardware=… devices=N inference.latency_limit_ms=… train.…=…"),
    ],
    goal: Annotated[Goal, typer.Option(help="Decoding or training throughput.")] = Goal.inference,
    layers: Annotated[str, typer.Option(help="FROM:TO:STEP, or values A,B.")] = "40:64:4",
    hidden: Annotated[str, typer.Option()] = "4096:8192:512",
    heads: Annotated[str, typer.Option()] = "32:64:8",
    kv_heads: Annotated[str, typer.Option(help="Of GQA; MLA has none.")] = "8,16",
    experts: Annotated[str, typer.Option(help="Routed experts.")] = "32:64:16",
    groups: Annotated[str, typer.Option(help="Left out: the model's own.")] = "",
    expert_width: Annotated[str, typer.Option()] = "768:2560:64",
    parameters: Annotated[str, typer.Option(help="Limits FROM:TO in billions.")] = "60:80",
    active: Annotated[str, typer.Option(help="The same for active parameters.")] = "0:1e6",
    tokens: Annotated[
        float, typer.Option(help="Billions that a shape is trained on, for its expected loss.")
    ] = 1000.0,
    quality: Annotated[
        bool,
        typer.Option(help="Leave out shapes that are expected to learn less than the model given."),
    ] = True,
    shortlist: Annotated[int, typer.Option(min=1, help="Shapes for the full model.")] = 48,
    top: Annotated[int, typer.Option(min=1, help="Shapes to show.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="Write the Pareto plot (.png, .svg).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search the shape of a model; the ranges left out are those that Pangu Pro MoE came from."""
    from configs.compose import load
    from simulator.commands.search import load_search_plan, progress_bar
    from simulator.shape import search_shapes
    from simulator.shape_space import Ranges

    must_be_drawable(plot)
    config = load_search_plan(overrides) if goal is Goal.training else load(overrides)
    ranges = Ranges(
        num_layers=values("--layers", layers),
        hidden_size=values("--hidden", hidden),
        num_attention_heads=values("--heads", heads),
        num_query_groups=[1] if config.model.attention == "mla" else values("--kv-heads", kv_heads),
        num_experts=values("--experts", experts),
        num_expert_groups=values("--groups", groups or str(config.moe.num_expert_groups)),
        moe_ffn_hidden_size=values("--expert-width", expert_width),
        parameters=limits("--parameters", parameters),
        active=limits("--active", active),
    )
    result = search_shapes(
        config,
        ranges,
        goal.value,
        shortlist=shortlist,
        tokens=_positive("--tokens", tokens) * 1e9 if quality else None,
        pinned=frozenset(line.lstrip("+").partition("=")[0] for line in overrides),
        progress=progress_bar("full model of the shortlist", quiet=as_json),
    )
    if as_json:
        print(json.dumps(to_json(result)))
    else:
        _show(config, goal, result, top)
    _plot(plot, config, goal, result, quiet=as_json)


def _plot(
    path: Path | None, config: Config, goal: Goal, result: ShapeResult, *, quiet: bool
) -> None:
    if path is None:
        return
    from simulator.shape_plot import pareto_plot

    pareto_plot(path, config, goal.value, result)
    if not quiet:
        print(f"wrote {path}")


def _positive(option: str, value: float) -> float:
    from math import isfinite

    from configs.violation import ConfigError, Violation

    if not (isfinite(value) and value > 0):
        raise ConfigError([Violation(option, value, "must be a positive, finite number")])
    return value


def limits(option: str, text: str) -> tuple[float, float]:
    """`FROM:TO` in billions.

    Raises:
        ConfigError: it is not, or nothing lies between.
    """
    from configs.violation import ConfigError, Violation

    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high:
        raise ConfigError([Violation(option, text, "must be FROM:TO in billions")])
    return low * 1e9, high * 1e9


def to_json(result: ShapeResult) -> dict[str, Any]:
    return {
        "evaluated": result.shortlisted,
        "candidates": result.candidates,
        "seconds": result.seconds,
        "rejected": result.rejected,
        "own": vars(result.own) if result.own else None,
        "ranking": [vars(shape) for shape in result.shapes],
        "pareto": [vars(shape) for shape in result.pareto],
    }


def _show(config: Config, goal: Goal, result: ShapeResult, top: int) -> None:
    from simulator.quality import FITTED, SOURCE

    console = wide_console()
    console.print(
        f"{result.candidates:,} shapes counted, {result.shortlisted} through the full model in"
        f" {result.seconds:.1f} s"
    )
    for reason, count in sorted(result.rejected.items(), key=lambda item: -item[1]):
        console.print(f"  {count:>12,} rejected because {reason}")
    assert config.hardware is not None
    where = f"{config.world_size} × {config.hardware['name']}"
    console.print(_table(f"fastest shapes, {goal.value} on {where}", result.shapes[:top]))
    shown = [*result.pareto, *([result.own] if result.own else [])]
    learnt = shown[0].loss is not None
    against = "expected loss" if learnt else "active parameters"
    title = f"Pareto front: throughput against {against}"
    console.print(_table(f"{title}; last, {config.model.name} itself", shown))
    if learnt:
        console.print(f"loss: {SOURCE}; {FITTED}: beyond that an extrapolation; --no-quality")
    else:
        console.print("what a shape learns is not asked: active parameters stand in for it")


COLUMNS = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "KV": "num_query_groups",
    "experts": "num_experts",
    "groups": "num_expert_groups",
    "width": "moe_ffn_hidden_size",
}


def _table(title: str, shapes: list[Shape]) -> Any:
    """One row for each shape. Dimensions that are the same for all stand in the caption."""
    from rich.table import Table

    same = {
        name: shapes[0].dimensions[key]
        for name, key in COLUMNS.items()
        if len({shape.dimensions[key] for shape in shapes}) == 1
    }
    table = Table(title=title)
    if same:
        table.caption = "all: " + ", ".join(f"{name} {value}" for name, value in same.items())
    names = [name for name in COLUMNS if name not in same]
    serving, learnt = shapes[0].tpot_ms is not None, shapes[0].loss is not None
    rest = ["batch", "ms/token"] if serving else ["MFU"]
    rest += ["loss"] if learnt else []
    for name in [*names, "B", "active B", "tokens/s/device", *rest, "GiB"]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("layout")
    for one in shapes:
        served = [str(one.batch), f"{one.tpot_ms:.1f}"] if serving else [f"{one.mfu:.1%}"]
        served += [f"{one.loss:.4f}"] if learnt else []
        table.add_row(
            *(str(one.dimensions[COLUMNS[name]]) for name in names),
            f"{one.parameters / 1e9:.1f}",
            f"{one.active / 1e9:.1f}",
            f"{one.tokens_per_second_per_device:,.0f}",
            *served,
            f"{one.memory_gib:.1f}",
            one.layout,
        )
    return table
