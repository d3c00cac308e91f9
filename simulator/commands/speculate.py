"""`python -m simulator speculate`: when drafts pay, and by how much (MoESD)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.commands import take, values, wide_console

if TYPE_CHECKING:
    import numpy as np

    from configs.schema import Config
    from simulator.serving import Serving
    from simulator.speculation import Curve
    from simulator.speculation_fit import Fit

DRAFT_TOKENS = 4  # where neither an option nor the configuration says a number
MOST_BATCH = 1024  # that is tried unasked
MOST_POINTS = 100_000


def speculate(
    overrides: Annotated[
        list[str],
        typer.Argument(
            help="model=… hardware=X,Y devices=N inference.draft=mtp|ngram|MODEL"
            " inference.acceptance_rate=… inference.host_ms=…"
        ),
    ],
    batch: Annotated[
        str | None,
        typer.Option(help="Sequences, FROM:TO:STEP or A,B; left out, powers of two that fit."),
    ] = None,
    draft_tokens: Annotated[
        str | None, typer.Option(help="Lengths of the draft (γ), likewise; left out, one.")
    ] = None,
    top_k: Annotated[
        str | None, typer.Option(help="Experts per token (K), likewise; left out, the model's own.")
    ] = None,
    popularity: Annotated[
        Path | None, typer.Option(help="expert_load.json of a run: how popular experts are.")
    ] = None,
    touched: Annotated[
        Path | None,
        typer.Option(help="speculative.measured of a run: experts that its passes touched."),
    ] = None,
    fit: Annotated[
        Path | None,
        typer.Option(
            help="CSV of measured speed-ups (batch,draft_tokens,top_k,sigma,speedup, perhaps fit):"
            " fits the paper's ten parameters and shows what they say beside."
        ),
    ] = None,
    fit_points: Annotated[int, typer.Option(min=1, help="Points to fit to without a mark.")] = 21,
    plot: Annotated[
        Path | None, typer.Option(help="Plot speed-up against batch (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Speed-up of speculative decoding over batch, draft length, sparsity and hardware."""
    from simulator.plot_file import must_be_drawable

    must_be_drawable(plot)
    machines, others = take("hardware", overrides)
    plans = [_plan([f"hardware={machine}", *others]) for machine in machines or ["null"]]
    lengths = _values("--draft-tokens", draft_tokens)
    lengths = lengths or [plans[0].inference.draft_tokens or DRAFT_TOKENS]
    sparsities, batches = _values("--top-k", top_k), _values("--batch", batch)
    _check_size(batches, len(lengths) * len(sparsities or [1]) * len(plans))
    fitted = _fit(plans[0], fit, fit_points) if fit else None
    loads = (popularity, touched)
    found = [_curves(config, sparsities, lengths, batches, loads) for config in plans]
    curves, dense = ([each for some in part for each in some] for part in zip(*found, strict=True))
    if plot:
        from simulator.speculation_plot import speedup_plot

        speedup_plot(plot, curves, dense)
    if as_json:
        print(json.dumps(_json(curves, dense, fitted)))
    else:
        _show(plans[0], curves, dense, fitted)


def _values(option: str, given: str | None) -> list[int] | None:
    return None if given is None else values(option, given)


def _plan(overrides: list[str]) -> Config:
    from configs.compose import load
    from configs.limits import bounded
    from configs.violation import ConfigError, Violation

    config = load(overrides)
    if broken := bounded(config.inference)[1]:
        raise ConfigError(
            [Violation(f"inference.{one.key}", one.value, one.reason) for one in broken]
        )
    return config


def _check_size(batches: list[int] | None, curves: int) -> None:
    from configs.violation import ConfigError, Violation

    if batches and max(batches) > 2**20:
        raise ConfigError([Violation("--batch", max(batches), f"must be at most {2**20}")])
    if (points := curves * len(batches or [1])) > MOST_POINTS:
        reason = f"with the other ranges makes {points:,} points, {MOST_POINTS:,} at most"
        raise ConfigError([Violation("--batch", len(batches or []), reason)])


def _curves(
    config: Config,
    sparsities: list[int] | None,
    lengths: list[int],
    batches: list[int] | None,
    loads: tuple[Path | None, Path | None],
) -> tuple[list[Curve], list[Curve]]:
    """The curves of one machine, and those of the dense twin beside them."""
    from simulator.hardware import load_hardware
    from simulator.moesd import read_popularity, read_touched
    from simulator.serving import serving
    from simulator.speculation import curve, dense_twin, with_popularity, with_top_k

    hardware = load_hardware(config.hardware)
    experts = config.model.num_experts
    layouts = [serving(config, hardware)]
    if sparsities:
        layouts = [serving(with_top_k(config, k), hardware) for k in sparsities]
    popularity, touched = loads
    if touched:
        measured = read_touched(touched)
        own = config.moe.top_k
        layouts = [
            replace(each, touched=measured) if each.moe.top_k == own else each for each in layouts
        ]
    if popularity:
        chosen = read_popularity(popularity, experts, config.moe.top_k)
        layouts = [with_popularity(layout, chosen) for layout in layouts]
    dense = [serving(dense_twin(config), hardware)] if experts else []
    sparse, twins = (
        [
            curve(layout, _batches(layout, batches, length), length)
            for layout in group
            for length in lengths
        ]
        for group in (layouts, dense)
    )
    return sparse, twins


def _batches(layout: Serving, asked: list[int] | None, draft_tokens: int) -> np.ndarray:
    """The batches of a curve: those asked for, or powers of two that fit.

    Raises:
        ConfigError: none fits.
    """
    import numpy as np

    from configs.violation import ConfigError, Violation
    from simulator.speculation import fits

    if asked is not None:
        return np.array(asked)
    tried = 2 ** np.arange(int(np.log2(MOST_BATCH)) + 1)
    found = tried[np.asarray(fits(layout, tried, draft_tokens), dtype=bool)]
    if not found.size:
        reason = f"one sequence does not fit {layout.hardware.memory_gib:.0f} GiB per device"
        raise ConfigError([Violation("devices", layout.devices, reason, "more devices")])
    return found


def _fit(config: Config, path: Path, wanted: int) -> Fit:
    from configs.violation import ConfigError, Violation
    from simulator.hardware import load_hardware
    from simulator.serving import serving
    from simulator.speculation_fit import fit, read_points

    experts = config.model.num_experts
    if not experts:
        reason = f"needs a model with experts, and {config.model.name} has none"
        raise ConfigError([Violation("--fit", path, reason)])
    hardware = load_hardware(config.hardware)
    dtype = serving(config, hardware).options.compute_dtype
    ridge = hardware.peak(dtype) / hardware.memory_bandwidth
    return fit(read_points(path, experts, wanted), experts, ridge)


def _json(curves: list[Curve], dense: list[Curve], fitted: Fit | None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "curves": [_plain(each, fitted) for each in curves],
        "dense": [_plain(each, None) for each in dense],
    }
    if fitted:
        result["fit"] = vars(fitted) | {"model": vars(fitted.model)}
    return result


def _plain(each: Curve, fitted: Fit | None) -> dict[str, Any]:
    """One curve as plain numbers, times in milliseconds."""
    import numpy as np

    from simulator.moesd import saturation_tokens

    layout, times = each.serving, each.times
    experts, top_k = layout.model.num_experts, layout.moe.top_k
    columns = {
        "batch": each.batch,
        "speedup": times.speedup,
        "sigma": times.sigma,
        "target_efficiency": times.target_efficiency,
        "plain_ms": 1e3 * np.asarray(times.plain),
        "verify_ms": 1e3 * np.asarray(times.verify),
        "draft_ms": 1e3 * np.asarray(times.draft),
        "rejection_ms": 1e3 * np.asarray(times.rejection),
        "fits": each.fits,
    }
    if each.active is not None:
        chosen = each.batch * (each.draft_tokens + 1.0) * top_k
        columns |= {"active_experts": each.active, "tokens_per_expert": chosen / each.active}
    if fitted:
        said = fitted.model.speedup(each.batch, each.draft_tokens, top_k, times.sigma)
        columns["fitted_speedup"] = said
    lists = [np.broadcast_to(column, each.batch.shape).tolist() for column in columns.values()]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]
    return {
        "hardware": layout.hardware.name,
        "model": layout.model.name,
        "devices": layout.devices,
        "draft": layout.options.draft,
        "acceptance_rate": layout.options.acceptance_rate,
        "draft_tokens": each.draft_tokens,
        "experts": experts,
        "top_k": top_k if experts else None,
        "saturation_tokens": saturation_tokens(experts, top_k) if experts else None,
        "peak": rows[each.peak],
        "rows": rows,
    }


def _show(config: Config, curves: list[Curve], dense: list[Curve], fitted: Fit | None) -> None:
    from rich.table import Table

    console = wide_console()
    options = config.inference
    console.print(
        f"[bold]{config.model.name}[/] on {config.world_size} devices; draft {options.draft}, each"
        f" token accepted with {options.acceptance_rate:g}"
    )
    table = Table(
        "hardware", "model", "K", "γ", "σ", "T_thres", "peak", "at batch", "pays at batch"
    )
    for each in (_plain(one, None) for one in [*curves, *dense]):
        pays = [str(row["batch"]) for row in each["rows"] if row["speedup"] > 1]
        table.add_row(
            each["hardware"],
            each["model"],
            str(each["top_k"] or "–"),
            str(each["draft_tokens"]),
            f"{each['peak']['sigma']:.3f}",
            str(each["saturation_tokens"] or "–"),
            f"{each['peak']['speedup']:.2f}×",
            str(each["peak"]["batch"]),
            ", ".join(pays) if len(pays) < 9 else f"{pays[0]} … {pays[-1]}",
        )
    console.print(table)
    if len(curves) == 1:
        console.print(_rows(_plain(curves[0], fitted)))
    if fitted:
        _show_fit(console, fitted)


def _rows(plain: dict[str, Any]) -> Any:
    from rich.table import Table

    names = {
        "batch": ("batch", "d"),
        "speedup": ("speed-up", ".2f"),
        "fitted_speedup": ("fitted", ".2f"),
        "target_efficiency": ("target efficiency", ".3f"),
        "active_experts": ("experts woken", ".1f"),
        "tokens_per_expert": ("tokens each", ".1f"),
        "plain_ms": ("T_T(B,1) ms", ".2f"),
        "verify_ms": ("T_T(B,γ) ms", ".2f"),
        "draft_ms": ("T_D ms", ".2f"),
        "rejection_ms": ("T_reject ms", ".2f"),
    }
    shown = {name: how for name, how in names.items() if name in plain["rows"][0]}
    table = Table()
    for head, _ in shown.values():
        table.add_column(head, justify="right")
    table.add_column("memory")
    for row in plain["rows"]:
        verdict = "fits" if row["fits"] else "[red]does not fit[/]"
        table.add_row(*(format(row[name], how) for name, (_, how) in shown.items()), verdict)
    return table


def _show_fit(console: Any, fitted: Fit) -> None:
    parameters = vars(fitted.model)
    others = fitted.points - fitted.used
    console.print(f"fitted to {fitted.used} of {fitted.points} points: MSE {fitted.mse_used:.2g}")
    if fitted.mse_others is not None:
        console.print(
            f"on the other {others}: MSE {fitted.mse_others:.2g}, error {fitted.mean_error:.1%} on"
            f" average, {fitted.max_error:.1%} at most"
        )
    said = ", ".join(f"{name} {value:.4g}" for name, value in parameters.items())
    console.print(f"parameters, times in units of bias: {said}")
