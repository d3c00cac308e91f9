"""The layouts that `simulator search` ranks, trained: does the order hold, and do the seconds?

    python -m pangu.calibrate --out machine.yaml --processes 4 backend=cpu backend.threads=1
    python -m benchmarks.search_order machine.yaml [--rate 200mbit] [--layouts 8]

Two nodes of two ranks (`tests.cluster`, which needs root) first complete the preset by the link
that they find between them. A search over their four devices ranks every layout of a model of the
quick start's kind; some of them, from the first to the last, train there as the experiment files
that `--emit` writes. Per layout: median seconds of a step beside the forecast. Last, how many of
all pairs are measured in the forecast's order. A table with the date goes to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.dispatchers import MODEL, TOP_K, calibrated, keep, measure
from simulator.commands.search import load_search_plan
from simulator.emit import experiment
from simulator.search import Choice, search
from simulator.words import layout_words

NODES, RANKS = 2, 2
NEAR = 0.05  # pairs of which one is slower by less have no order


def ranked(overrides: list[str], count: int) -> list[Choice]:
    """So many layouts of the search's ranking, evenly from the first to the last."""
    pinned = frozenset(line.partition("=")[0] for line in overrides)
    choices = search(load_search_plan(overrides), pinned=pinned, top=1000).choices
    if len(choices) <= count:
        return choices
    return [choices[round(i * (len(choices) - 1) / (count - 1))] for i in range(count)]


def in_order(pairs: list[tuple[float, float]]) -> tuple[int, int]:
    """Of (forecast, measured): pairs in the same order, and pairs that have one."""
    same = apart = 0
    for (forecast, found), (other_forecast, other) in itertools.combinations(pairs, 2):
        if max(found, other) > (1 + NEAR) * min(found, other):
            apart += 1
            same += (forecast < other_forecast) == (found < other)
    return same, apart


def main() -> int:
    from tests.cluster import obstacle

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", type=Path, help="what pangu.calibrate wrote")
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--layouts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if reason := obstacle():
        print(f"left out: {reason}")
        return 0
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at "
        f"the start; {NODES} nodes of {RANKS} ranks, links of {options.rate}; medians of "
        f"{options.rounds} runs.",
        "",
        "| layout | step s | forecast s | error |",
        "|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        hardware = Path(folder) / "machine.yaml"
        calibrated(options.machine, NODES, RANKS, options.rate, hardware)
        overrides = [*MODEL, *TOP_K, f"hardware={hardware}", f"devices={NODES * RANKS}"]
        overrides += [f"launch.nodes={NODES}", f"launch.processes={RANKS}"]
        found: list[tuple[float, float]] = []
        for number, choice in enumerate(ranked(overrides, options.layouts)):
            file = Path(folder) / f"{number}.yaml"
            file.write_text(experiment(choice.config, overrides))
            command = [f"experiment={file}"]
            seconds = statistics.median(
                measure(NODES, RANKS, options.rate, command) for _ in range(options.rounds)
            )
            forecast = choice.prediction.step_seconds
            found.append((forecast, seconds))
            error = forecast / seconds - 1
            layout = layout_words(choice.config)
            lines.append(f"| {layout} | {seconds:.2f} | {forecast:.2f} | {error:+.0%} |")
            print(lines[-1], flush=True)
    same, apart = in_order(found)
    lines += ["", f"{same} of {apart} pairs that are {NEAR:.0%} apart are in the forecast's order."]
    print(*lines[-2:], sep="\n")
    keep(__file__, "Layouts in the order of the search", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
