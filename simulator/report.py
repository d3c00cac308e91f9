"""A forecast or a search as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import Config
from simulator.hardware import GRADES
from simulator.page import fill
from simulator.predict import Forecast
from simulator.search import Choice, SearchResult
from simulator.words import layout_words, recompute_words, schedule_words

TEMPLATE = Path(__file__).with_name("report.html")
MOST_POINTS = 2_000  # of a search: more than an eye tells apart
MOST_LINES = 40  # of the bill
MEMORY = ("weights", "gradients", "optimizer", "activations", "temporary", "buffers")
PASSES = ("F", "B", "I", "W", "FB")


def write_report(
    path: Path, config: Config, prediction: Forecast, search: SearchResult | None = None
) -> None:
    """Write the page of a forecast, and of the search that it won."""
    path.write_text(fill(TEMPLATE, report_data(config, prediction, search)), encoding="utf-8")


def report_data(
    config: Config, prediction: Forecast, search: SearchResult | None = None
) -> dict[str, Any]:
    """What the page shows. Seconds, GiB and shares as plain numbers."""
    p = prediction
    assert config.hardware is not None
    return {
        "title": f"{config.model.name} on {p.devices:,} × {config.hardware['name']}",
        "subtitle": f"{layout_words(config)} · {schedule_words(config.parallel)} · batch of"
        f" {config.train.global_batch_size:,} × {config.train.seq_length:,} tokens",
        "tiles": _tiles(p),
        "step": p.step_seconds,
        "breakdown": sorted(p.breakdown.items(), key=lambda item: -item[1]),
        "timeline": _timeline(p),
        "memory": _memory(p),
        "bill": _bill(p),
        "evidence": [
            [figure, GRADES.get(grade[:1], ""), grade.partition(":")[2].strip()]
            for figure, grade in config.hardware["evidence"].items()
        ],
        "search": search_data(search, p.memory_gib) if search else None,
    }


def _tiles(p: Forecast) -> list[list[str]]:
    """[value, what it is]."""
    error = ""
    if p.error:
        error = f" ({p.error.low:+.0%} … {p.error.high:+.0%}, {p.error.rows} published runs)"
    verdict = "fits" if p.fits else "does not fit"
    tiles = [
        [f"{p.step_seconds:.3g} s", f"per step{error}"],
        [f"{p.tokens_per_second_per_device:,.0f}", "tokens/s per device"],
        [f"{p.tokens_per_second:,.0f}", "tokens/s in all"],
        [f"{p.mfu:.1%}", f"MFU, of {p.peak_tflops:.1f} TFLOPS {p.peak_dtype}"],
        [f"{p.peak_memory_gib:.1f} GiB", f"peak memory of {p.memory_gib:.0f} GiB: {verdict}"],
        [f"{p.bubble_fraction:.1%}", f"bubble, {p.num_microbatches} micro-batches"],
    ]
    if p.energy_kilojoules is not None:
        tiles.append([f"{p.energy_kilojoules / 3600:,.3g} kWh", "energy of the devices per step"])
    if p.cost_per_million_tokens is not None:
        tiles.append([f"{p.cost_per_million_tokens:,.3g}", "price per million tokens"])
    return tiles


def _timeline(p: Forecast) -> dict[str, Any]:
    """Passes by rank as [kind, micro-batch, chunk, start, end], and what follows them."""
    ranks: list[list[list[float]]] = [[] for _ in p.stages]
    drawn = 0.0
    for event in p.timeline.events:
        ends = (float(f"{event.start:.6g}"), float(f"{event.end:.6g}"))
        ranks[event.rank].append([PASSES.index(event.kind), event.micro_batch, event.chunk, *ends])
        drawn = max(drawn, event.end)
    after = []
    clock = drawn
    for name in ("gradient reduction", "optimizer", "parameter gathering"):
        if seconds := p.breakdown.get(name, 0.0):
            after.append([name, clock, clock + seconds])
            clock += seconds
    batches = 1 + max((event.micro_batch for event in p.timeline.events), default=0)
    return {
        "passes": PASSES,
        "ranks": ranks,
        "after": after,
        "end": clock,
        "chunks": 1 + max((event.chunk for event in p.timeline.events), default=0),
        "drawn": batches,
        "microbatches": p.num_microbatches,
    }


def _memory(p: Forecast) -> dict[str, Any]:
    gib = [[float(getattr(stage.memory, kind)) / 2**30 for kind in MEMORY] for stage in p.stages]
    return {
        "kinds": MEMORY,
        "gib": [[round(value, 3) for value in row] for row in gib],
        "layers": [stage.layers for stage in p.stages],
        "limit": p.memory_gib,
    }


def _bill(p: Forecast) -> list[list[Any]]:
    """The operators and messages that show most: block, what, phase, how often per micro-batch,
    ms each, exposed ms in all."""
    lines: list[list[Any]] = [
        [
            entry.block,
            entry.line.name + (f" over {entry.line.group}" if entry.line.group else ""),
            entry.line.phase.replace("_", " "),
            entry.count,
            float(entry.line.seconds) * 1e3,
            entry.count * float(entry.line.exposed) * 1e3,
        ]
        for entry in p.bill
    ]
    return sorted(lines, key=lambda line: float(line[-1]), reverse=True)[:MOST_LINES]


def search_data(result: SearchResult, memory_gib: float) -> dict[str, Any]:
    """What a page shows of a search on devices of `memory_gib`."""
    count = len(result.throughput)
    chosen = np.random.default_rng(0).permutation(count)[:MOST_POINTS]
    cloud = np.stack([memory_gib - result.peak_gib[chosen], result.throughput[chosen]], axis=1)
    return {
        "candidates": result.candidates,
        "evaluated": result.evaluated,
        "fitting": result.fitting,
        "seconds": result.seconds,
        "rejected": sorted(result.rejected.items(), key=lambda item: -item[1]),
        "cloud": np.round(cloud, 3).tolist(),
        "front": [choice_data(choice) for choice in result.pareto],
        "ranking": [choice_data(choice) for choice in result.choices],
    }


def choice_data(choice: Choice) -> dict[str, Any]:
    """A layout in a table or as a dot."""
    p = choice.prediction
    return {
        "layout": layout_words(choice.config, recompute=False),
        "recompute": recompute_words(choice.config.memory),
        "headroom": choice.headroom_gib,
        "rate": p.tokens_per_second_per_device,
        "step": p.step_seconds,
        "mfu": p.mfu,
        "bubble": p.bubble_fraction,
        "peak": p.peak_memory_gib,
    }
