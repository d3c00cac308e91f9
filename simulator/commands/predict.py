"""`python -m simulator predict`: step time, throughput, MFU and memory of one configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.commands import load_settled, wide_console

if TYPE_CHECKING:
    from rich.console import Console

    from configs.schema import Config
    from simulator.predict import Forecast
    from simulator.sensitivity import Effect

SHOWN = 1e-3  # change of the step
MIB = 2**20


def predict(
    overrides: Annotated[
        list[str],
        typer.Argument(help="model=… hardware=… devices=N parallel.…=… train.…=… as in training"),
    ],
    explain: Annotated[
        bool, typer.Option("--explain", help="Every operator and message, and the evidence.")
    ] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Which figures of the machine it hangs on.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome/Perfetto timeline to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Forecast step time, throughput, MFU and memory of one configuration."""
    from simulator.predict import predict as forecast

    config, policy = load_settled(overrides)
    prediction = forecast(config)
    if trace:
        from simulator.trace import chrome_trace

        trace.write_text(json.dumps(chrome_trace(prediction)))
    effects = _effects(config) if sensitivity else []
    if as_json:
        more: dict[str, object] = {"bill": _bill(prediction)} if explain else {}
        if sensitivity:
            more["sensitivity"] = [vars(effect) for effect in effects]
        if policy:
            more["memory_policy"] = policy.to_json()
        print(json.dumps(prediction.to_json() | more))
        return
    console = wide_console()
    if policy:
        console.print(policy.table())
    _summary(console, config, prediction)
    if explain:
        _explain(console, config, prediction)
    if sensitivity:
        _hangs_on(console, effects)


def _effects(config: Config) -> list[Effect]:
    from simulator.sensitivity import sensitivity

    return sensitivity(config)


def _hangs_on(console: Console, effects: list[Effect]) -> None:
    """Figures that move the step by at least a thousandth."""
    from rich.table import Table

    from simulator.hardware import GRADES

    def percent(change: float | None) -> str:
        return "" if change is None else f"{change:+.1%}"

    table = Table("figure", "10 % lower", "10 % higher", "evidence")
    for effect in effects:
        if effect.size >= SHOWN:
            words = GRADES.get(effect.evidence[:1], "")
            table.add_row(effect.figure, percent(effect.lower), percent(effect.higher), words)
    table.title = "what the step hangs on: its change with a figure of the machine"
    console.print(table)


def _bill(prediction: Forecast) -> list[dict[str, object]]:
    return [
        {
            "block": entry.block,
            "blocks": entry.count,
            "name": entry.line.name,
            "phase": entry.line.phase,
            "kind": entry.line.kind,
            "group": entry.line.group,
            "seconds": float(entry.line.seconds),
            "exposed_seconds": float(entry.line.exposed),
            "flops": float(entry.line.flops),
            "bytes": float(entry.line.bytes),
        }
        for entry in prediction.bill
    ]


def _summary(console: Console, config: Config, p: Forecast) -> None:
    from rich.table import Table

    error = ""
    if p.error:
        error = f"  ({p.error.low:+.0%} … {p.error.high:+.0%}, {p.error.rows} published runs:"
        error += f" {p.error.source})"
    assert config.hardware is not None
    console.print(f"[bold]{config.model.name}[/] on {p.devices} × {config.hardware['name']}")
    console.print(f"step          {p.step_seconds:.3f} s{error}")
    console.print(
        f"throughput    {p.tokens_per_second:,.0f} tokens/s,"
        f" {p.tokens_per_second_per_device:,.1f} per device"
    )
    console.print(
        f"MFU           {p.mfu:.1%} of {p.peak_tflops:.1f} TFLOPS {p.peak_dtype}"
        f" ({p.model_flops_per_token / 1e9:.1f} GFLOPs per token, causal attention once)"
    )
    verdict = "fits" if p.fits else "[red]does not fit[/]"
    console.print(f"memory        {p.peak_memory_gib:.1f} of {p.memory_gib:.1f} GiB: {verdict}")
    console.print(f"bubble        {p.bubble_fraction:.1%}, {p.num_microbatches} micro-batches")
    if p.expert_load > 1:
        console.print(f"experts       fullest rank {p.expert_load:.2f} × the mean load")
    messages = p.expert_messages
    if messages.beside_layer or messages.beside_micro_batch:
        console.print(
            f"messages      experts' {messages.seconds:.3f} s: beside their own layer's computing"
            f" {messages.beside_layer:.3f}, another micro-batch's {messages.beside_micro_batch:.3f}"
        )
    if p.energy_kilojoules is not None:
        console.print(f"energy        {p.energy_kilojoules:,.1f} kJ per step")
    if p.cost_per_million_tokens is not None:
        console.print(f"cost          {p.cost_per_million_tokens:.3f} per million tokens")
    table = Table("where the step goes (slowest rank)", "seconds", "share")
    for name, seconds in sorted(p.breakdown.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{seconds:.4f}", f"{seconds / p.step_seconds:.1%}")
    console.print(table)
    _memory(console, p)


def _memory(console: Console, p: Forecast) -> None:
    """Stages that differ, each once."""
    from rich.table import Table

    kinds = ["weights", "gradients", "optimizer", "activations", "temporary", "peak", "buffers"]
    table = Table("rank", "layers", "forward ms", "backward ms", "idle s", *kinds)
    for stage in p.stages:
        table.add_row(
            str(stage.rank),
            str(stage.layers),
            f"{stage.forward_seconds * 1e3:.1f}",
            f"{stage.backward_seconds * 1e3:.1f}",
            f"{stage.idle_seconds:.3f}",
            *(f"{float(getattr(stage.memory, kind)) / 2**30:.2f}" for kind in kinds),
        )
    table.title = "pipeline ranks; memory in GiB"
    console.print(table)


def _explain(console: Console, config: Config, p: Forecast) -> None:
    from rich.table import Table

    table = Table("block", "×", "line", "phase", "µs", "exposed µs", "TFLOPS", "MiB", "again")
    for entry in p.bill:
        line = entry.line
        rate = float(line.flops) / float(line.seconds) / 1e12
        where = f"{line.kind} over {line.group}" if line.group else line.kind
        table.add_row(
            entry.block,
            str(entry.count),
            f"{line.name} ({where})",
            line.phase,
            f"{float(line.seconds) * 1e6:.1f}",
            f"{float(line.exposed) * 1e6:.1f}",
            f"{rate:.0f}" if rate else "",
            f"{float(line.bytes) / MIB:.1f}",
            "recomputed" if line.repeated else "",
        )
    table.title = "one micro-batch on the slowest rank"
    console.print(table)
    from simulator.hardware import GRADES

    assert config.hardware is not None
    evidence = Table("figure", "evidence", title=f"{config.hardware['name']}: evidence")
    for name, grade in config.hardware["evidence"].items():
        letter, _, rest = grade.partition(":")
        words = GRADES.get(letter[:1], "")
        evidence.add_row(name, f"{words}{':' + rest if rest else ''}")
    console.print(evidence)
