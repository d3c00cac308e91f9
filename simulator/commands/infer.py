"""`python -m simulator infer`: prefill and decoding of one configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.commands import wide_console

if TYPE_CHECKING:
    from rich.console import Console

    from configs.schema import Config
    from simulator.inference import ServingForecast
    from simulator.serving import Serving

SLOW = 5.0  # seconds to the first token that nobody waits for unasked
MOST_DEVICES = 1024  # that a refusal looks for a number that would work among


def infer(
    overrides: Annotated[
        list[str],
        typer.Argument(help="model=… hardware=… devices=N parallel.…=… inference.…=…"),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time to first token, time per output token, throughput and the largest batch."""
    from configs.compose import load
    from configs.violation import ConfigError, Violation
    from simulator.hardware import load_hardware
    from simulator.inference import forecast, largest_batch, usable_bytes
    from simulator.serving import serving

    config = load(overrides)
    layout = serving(config, load_hardware(config.hardware))
    most, stopped_by = largest_batch(layout)
    batch = config.inference.batch_size or most
    if not batch:
        limit = usable_bytes(layout) / 2**30
        reason = f"one sequence does not fit {limit:.1f} GiB per device"
        if stopped_by == "latency":
            reason = f"no batch stays within {config.inference.latency_limit_ms:g} ms per token"
        raise ConfigError([Violation("devices", layout.devices, reason, _more_devices(config))])
    result = forecast(layout, batch)
    if as_json:
        plain = {
            name: value for name, value in vars(result).items() if name not in ("prefill", "decode")
        }
        for name, step in (("prefill", result.prefill), ("decode", result.decode)):
            plain[f"{name}_parts"] = {key: float(value) for key, value in step.parts.items()}
        plain |= {"largest_batch": most, "stopped_by": stopped_by, "devices": layout.devices}
        plain["warnings"] = _warnings(config, result.ttft_seconds)
        print(json.dumps(plain))
        return
    console = wide_console()
    console.print(f"[bold]{config.model.name}[/] on {layout.devices} × {layout.hardware.name}")
    console.print(f"batch         {batch} sequences ({most} at most: {stopped_by})")
    _show(console, layout, result)
    for warning in _warnings(config, result.ttft_seconds):
        console.print(f"note: {warning}")


def _show(console: Console, layout: Serving, result: ServingForecast) -> None:
    from rich.table import Table

    options = layout.options
    console.print(
        f"layout        attention {layout.attention_dp} × TP{layout.tp}, experts EP{layout.ep} ×"
        f" TP{layout.etp}; weights {options.weight_dtype}, products {options.compute_dtype},"
        f" cache {options.kv_dtype}"
    )
    console.print(
        f"first token   {1e3 * result.ttft_seconds:.1f} ms ({options.prompt_length} tokens)"
    )
    console.print(
        f"each token    {1e3 * result.tpot_seconds:.2f} ms ({options.max_new_tokens} tokens)"
    )
    console.print(f"throughput    {result.tokens_per_second_per_device:,.1f} tokens/s per device")
    verdict = "fits" if result.fits else "[red]does not fit[/]"
    available = layout.hardware.memory_gib
    console.print(f"memory        {result.memory_gib:.1f} of {available:.1f} GiB: {verdict}")
    table = Table("where a step goes", "decode ms", "prefill ms")
    for name in result.decode.parts:
        first = result.prefill.parts.get(name, 0.0)
        table.add_row(
            name, f"{1e3 * float(result.decode.parts[name]):.2f}", f"{1e3 * float(first):.2f}"
        )
    console.print(table)


def _warnings(config: Config, ttft_seconds: float) -> list[str]:
    """What a user who asked for nothing in particular may not have wanted."""
    options = config.inference
    if options.latency_limit_ms or options.batch_size or ttft_seconds < SLOW:
        return []
    sentence = f"the batch is the largest that fits, and its first token takes {ttft_seconds:.0f} s"
    return [f"{sentence}: inference.latency_limit_ms=50 limits the batch"]


def _more_devices(config: Config) -> str:
    """The first number of devices, doubling, that serves `config` within its limits; "" for none.

    Sizes that the configuration sets stay as they are.
    """
    from configs.violation import ConfigError
    from simulator.hardware import load_hardware
    from simulator.inference import largest_batch
    from simulator.serving import serving

    hardware = load_hardware(config.hardware)
    devices = config.world_size
    while (devices := 2 * devices) <= MOST_DEVICES:
        try:
            if largest_batch(serving(replace(config, devices=devices), hardware))[0]:
                return f"devices={devices}"
        except ConfigError:
            continue
    return ""
