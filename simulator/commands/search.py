"""`python -m simulator search`: which layout and which memory policy to use on a cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.commands import wide_console

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from configs.schema import Config
    from simulator.search import Choice, SearchResult


def search(
    overrides: Annotated[
        list[str],
        typer.Argument(help="model=… hardware=… devices=N train.…=…; parallel.…=… pins a size"),
    ],
    everything: Annotated[
        bool,
        typer.Option("--everything", help="Also schedules and ZeRO stages that only plan."),
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 10,
    emit: Annotated[
        Path | None,
        typer.Option(help="Write the best as an experiment (.yaml) and as launch flags beside it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rank every layout, micro-batch and recomputation policy of a cluster."""
    from configs.violation import ConfigError, Violation
    from simulator.search import search as find

    config = load_search_plan(overrides)
    pinned = frozenset(map(_key, overrides))
    result = find(
        config,
        pinned=pinned,
        everything=everything,
        top=top,
        progress=progress_bar("evaluating layouts", quiet=as_json),
    )
    if as_json:
        print(json.dumps(to_json(result)))
    else:
        _show(result)
    if not result.choices:
        hint = "more devices, or pin fewer sizes"
        raise ConfigError([Violation("devices", config.world_size, result.why_none, hint)])
    if emit:
        from simulator.emit import experiment
        from simulator.flags import launch_flags

        best = result.choices[0].config
        emit.write_text(experiment(best, overrides))
        emit.with_suffix(".flags").write_text(launch_flags(best))
        if not as_json:
            print(f"wrote {emit} and {emit.with_suffix('.flags')}; run: experiment={emit}")


def load_search_plan(overrides: list[str]) -> Config:
    """The configuration, checked for everything but the sizes that the search decides on, which
    it rejects itself, with a count."""
    from dataclasses import replace

    from configs.check import violations
    from configs.compose import load
    from configs.schema import ParallelConfig
    from configs.violation import ConfigError, Violation

    config = load(overrides)
    if not config.hardware:
        reason, hint = "a search needs a machine", "hardware=NAME"
        raise ConfigError([Violation("hardware", None, reason, hint)])
    given = {_key(line) for line in overrides} - _SIZES
    kept = {name for name in vars(config.parallel) if f"parallel.{name}" in given}
    parallel = ParallelConfig(**{name: getattr(config.parallel, name) for name in kept})
    train = replace(config.train, micro_batch_size=1, global_batch_size=config.world_size)
    if wrong := violations(replace(config, parallel=parallel, train=train), purpose="plan"):
        raise ConfigError(wrong)
    return config


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


_SIZES = {
    *("parallel", "train.micro_batch_size", "train.global_batch_size"),
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.pipeline_layout",
    "parallel.num_noop_layers",
    "parallel.context_parallel_size",
    "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size",
}


def to_json(result: SearchResult) -> dict[str, Any]:
    from simulator.search import MARGIN

    best = _entry(result.choices[0]) if result.choices else {}
    return {
        **{key: best.get(key) for key in _FIGURES},
        "evaluated": result.evaluated,
        "seconds": result.seconds,
        "candidates": result.candidates,
        "fitting": result.fitting,
        "memory_margin": MARGIN,
        "rejected": result.rejected,
        "ranking": [_entry(choice) for choice in result.choices],
        "pareto": [_entry(choice) for choice in result.pareto],
    }


_FIGURES = ("step_seconds", "tokens_per_second_per_device", "mfu", "peak_memory_gib")


def _entry(choice: Choice) -> dict[str, Any]:
    p, config = choice.prediction, choice.config
    return {
        **{key: getattr(p, key) for key in _FIGURES},
        "bubble_fraction": p.bubble_fraction,
        "headroom_gib": choice.headroom_gib,
        "parallel": vars(config.parallel),
        "memory": vars(config.memory),
        "train": {"micro_batch_size": config.train.micro_batch_size},
    }


def _show(result: SearchResult) -> None:
    from simulator.search import MARGIN

    console = wide_console()
    rate = result.evaluated / max(result.seconds, 1e-9)
    console.print(
        f"{result.candidates:,} candidates, {result.evaluated:,} evaluated in"
        f" {result.seconds:.1f} s ({rate:,.0f}/s), {result.fitting:,} fit with {MARGIN:.0%} of"
        " their peak to spare"
    )
    for reason, count in sorted(result.rejected.items(), key=lambda item: -item[1]):
        console.print(f"  {count:>12,} rejected because {reason}")
    if not result.choices:
        return
    console.print(_table("fastest layouts", result.choices))
    console.print(_table("Pareto front: throughput against memory", result.pareto))


def _table(title: str, choices: list[Choice]) -> Table:
    from rich.table import Table

    from simulator.words import recompute_words, schedule_words, stages_words

    sizes = ["TP", "PP", "VPP", "CP", "EP", "ETP", "DP", "MBS"]
    figures = ["step s", "tokens/s/device", "MFU", "bubble", "peak GiB"]
    table = Table(*sizes, "layers", "recompute", "schedule", *figures, title=title)
    for choice in choices:
        config, p = choice.config, choice.prediction
        parallel = config.parallel
        table.add_row(
            str(parallel.tensor_model_parallel_size),
            str(parallel.pipeline_model_parallel_size),
            str(parallel.virtual_pipeline_model_parallel_size),
            str(parallel.context_parallel_size),
            str(parallel.expert_model_parallel_size),
            str(parallel.expert_tensor_parallel_size),
            str(config.data_parallel_size),
            str(config.train.micro_batch_size),
            stages_words(parallel),
            recompute_words(config.memory),
            schedule_words(parallel),
            f"{p.step_seconds:.3f}",
            f"{p.tokens_per_second_per_device:,.1f}",
            f"{p.mfu:.1%}",
            f"{p.bubble_fraction:.1%}",
            f"{p.peak_memory_gib:.1f}",
        )
    return table


def progress_bar(title: str, *, quiet: bool = False) -> Callable[[int, int], None] | None:
    """Called with what is done and what there is in all; None where nobody watches."""
    if quiet or not sys.stderr.isatty():
        return None
    from rich.progress import Progress

    bar = Progress(transient=True)
    task = bar.add_task(title)
    bar.start()

    def update(done: int, count: int) -> None:
        bar.update(task, total=count, completed=done)
        if done == count:
            bar.stop()

    return update
