"""Our forecasts beside those of other simulators: error on the same published runs, and
evaluations per second.

    python benchmarks/peers.py --calculon DIR --simumax DIR --llm-analysis DIR \\
        [--python VENV/bin/python] [--markdown FILE]

A peer is a checkout of its repository that you bring; one that is absent is skipped. It runs in a
process of its own, in the interpreter that has what it imports, with the machines and efficiencies
that it ships. A row of the packaged table counts for a peer that has words for it (`adapters/`);
what a row leaves open is filled in for everybody by the rules of `validate`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from adapters.registry import PEERS, Answer, Peer, PeerError, Settings, ask, version
from adapters.speed import LAYOUTS, SECONDS, our_speeds, sweep
from rich.console import Console
from rich.table import Table

from configs.schema import Config
from configs.violation import ConfigError
from simulator.predict import Forecast, predict
from simulator.validation.engine import Case, NotPredictable, case
from simulator.validation.measure import in_unit
from simulator.validation.rows import Accuracy, Outcome, accuracy
from simulator.validation.split import split_of
from simulator.validation.table import read_table

NO_LIMIT = 1e9  # seconds


@dataclass(frozen=True)
class Shared:
    """A row that can be forecast, and our forecast."""

    found: Case
    prediction: Forecast
    ours: Outcome

    @property
    def group(self) -> tuple[str, str]:
        """Source and whether our constants were calibrated on the row."""
        source = re.sub(r" \(values.*", "", self.ours.source)
        return f"{source}, memory" if self.ours.is_memory else source, self.ours.split


@dataclass(frozen=True)
class Column:
    """What a peer says of the rows that it has words for."""

    name: str
    answered: list[tuple[Shared, Outcome]]
    refused: Counter[str]  # rows by reason

    def groups(self) -> dict[tuple[str, str], tuple[Accuracy, Accuracy]]:
        """Theirs and ours by source and split."""
        rows: dict[tuple[str, str], list[tuple[Shared, Outcome]]] = {}
        for shared, theirs in self.answered:
            rows.setdefault(shared.group, []).append((shared, theirs))
        return {group: self._pair(some) for group, some in rows.items()}

    def totals(self) -> dict[str, tuple[Accuracy, Accuracy]]:
        """Theirs and ours over all rows of a kind."""
        time = [row for row in self.answered if not row[0].ours.is_memory]
        kinds = {
            "time": time,
            "time, rows judged": [row for row in time if row[0].ours.split == "judged"],
            "memory": [row for row in self.answered if row[0].ours.is_memory],
        }
        return {kind: self._pair(rows) for kind, rows in kinds.items() if rows}

    def _pair(self, rows: list[tuple[Shared, Outcome]]) -> tuple[Accuracy, Accuracy]:
        theirs = accuracy(self.name, [outcome for _, outcome in rows])
        return theirs, accuracy("ours", [shared.ours for shared, _ in rows])


def forecastable() -> list[Case]:
    """Rows of the packaged table that give enough for a forecast."""
    found = []
    for row in read_table():
        try:
            if row.measured is not None:
                found.append(case(row))
        except NotPredictable:
            continue
    return found


def share(found: Case) -> Shared | None:
    """Our forecast of a row, if some peer has words for it and we give one."""
    if not any(_has_words(settings, found.config) for settings in _variants()):
        return None
    row = found.row
    try:
        prediction = predict(found.config)
        value = in_unit(found, prediction)
    except (ConfigError, NotPredictable):
        return None
    ours = Outcome(
        id=row["id"],
        source=row["source"],
        metric=row["measured_metric"],
        measured=row.measured or 0.0,
        predicted=value,
        split=split_of(row["source"], row["model"]),
    )
    return Shared(found, prediction, ours)


def _variants() -> list[Settings]:
    return [settings for peer in PEERS for settings in peer.variants.values()]


def _has_words(settings: Settings, config: Config) -> bool:
    try:
        settings(config)
    except ValueError:
        return False
    return True


def compare(
    settings: Settings, rows: list[Case], shared: dict[str, Shared], answer: Answer, name: str
) -> Column:
    """One variant of a peer over the rows; `answer` puts its settings to it."""
    questions, asked = [], []
    refused: Counter[str] = Counter()
    for found in rows:
        try:
            question = settings(found.config)
        except ValueError as reason:
            refused[str(reason)] += 1
            continue
        if found.row["id"] in shared:
            questions.append(question)
            asked.append(shared[found.row["id"]])
        else:
            refused["no forecast of ours"] += 1
    answered = []
    for row, said in zip(asked, answer(questions, NO_LIMIT)[0], strict=True):
        if "reason" in said:
            refused[said["reason"]] += 1
            continue
        value = in_row_unit(row, said["step_seconds"], said["peak_gib"])
        answered.append((row, replace(row.ours, predicted=value)))
    return Column(name, answered, refused)


def in_row_unit(shared: Shared, step_seconds: float, peak_gib: float) -> float:
    """A peer's forecast in the row's unit, by the same formula as ours."""
    ours = shared.prediction
    faster = ours.step_seconds / step_seconds
    theirs = replace(
        ours,
        step_seconds=step_seconds,
        tokens_per_second=faster * ours.tokens_per_second,
        tokens_per_second_per_device=faster * ours.tokens_per_second_per_device,
        peak_memory_gib=peak_gib,
    )
    return in_unit(shared.found, theirs)


def published(column: Column) -> str:
    """How far a peer's forecasts are from those that it published itself, where a row's notes
    have them."""
    apart = []
    for shared, theirs in column.answered:
        stated = re.search(r"SimuMax predicted ([\d.]+)", shared.found.row["notes"])
        if stated and theirs.predicted:
            apart.append(abs(theirs.predicted / float(stated.group(1)) - 1.0))
    if not apart or column.name != "SimuMax":
        return ""
    return (
        f"{column.name}'s own published forecasts of {len(apart)} of these rows come out here"
        f" within {max(apart):.2%}."
    )


def by_source(columns: list[Column]) -> list[list[str]]:
    """Cells: peer, source, what the rows are to us, rows, theirs, ours; our worst place first."""
    places = [(column.name, *item) for column in columns for item in column.groups().items()]
    places.sort(key=lambda place: (place[2][0].mean_error or 0) - (place[2][1].mean_error or 0))
    return [
        [name, *group, str(ours.rows), *_four(theirs), *_four(ours)]
        for name, group, (theirs, ours) in places
    ]


def in_all(columns: list[Column]) -> list[list[str]]:
    """Cells: peer, kind of rows, how many, theirs, ours."""
    return [
        [column.name, kind, str(ours.rows), *_four(theirs), *_four(ours)]
        for column in columns
        for kind, (theirs, ours) in column.totals().items()
    ]


def _four(entry: Accuracy) -> list[str]:
    sizes = (entry.mean_error, entry.median_error, entry.max_error)
    return [*(f"{value or 0:.1%}" for value in sizes), f"{entry.bias or 0:+.1%}"]


def by_row(columns: list[Column], rows: list[Shared]) -> list[list[str]]:
    """Cells: row, measured, our error, each column's error."""
    said = [
        {shared.ours.id: theirs.error for shared, theirs in column.answered} for column in columns
    ]
    lines = []
    for shared in rows:
        errors = [errors.get(shared.ours.id) for errors in said]
        if any(error is not None for error in errors):
            cells = ["" if error is None else f"{error:+.1%}" for error in errors]
            measured = f"{shared.ours.measured:g} {shared.ours.metric.split(' (')[0]}"
            lines.append([shared.ours.id, measured, f"{shared.ours.error or 0:+.1%}", *cells])
    return lines


def speed_lines(speeds: dict[str, tuple[int, float]]) -> list[list[str]]:
    """Cells: who, layouts, seconds, layouts per second; the fastest first."""
    order = sorted(speeds.items(), key=lambda item: item[1][1] / item[1][0])
    lines = []
    for name, (count, seconds) in order:
        rate = count / seconds
        lines.append([name, f"{count:,}", f"{seconds:.2f}", f"{rate:,.{0 if rate > 100 else 1}f}"])
    return lines


REST = ("median", "max", "bias")
ERRORS = ["theirs: mean", *REST, "ours: mean", *REST]
TABLES = {
    "in all": ["peer", "of", "rows", *ERRORS],
    "by source": ["peer", "source", "our rows are", "rows", *ERRORS],
    "speed": ["one process, one thread", "layouts", "seconds", "per second"],
}


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(headings)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rule, *lines])


def show(console: Console, title: str, headings: list[str], lines: list[list[str]]) -> None:
    table = Table(*headings, title=title)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def page(
    peers: list[tuple[Peer, Path]],
    columns: list[Column],
    rows: list[Shared],
    speeds: dict[str, tuple[int, float]],
) -> str:
    """docs/simulator-peers.md."""
    parts = [
        "# Beside other simulators",
        "Written by `python benchmarks/peers.py --markdown docs/simulator-peers.md` on"
        f" {datetime.date.today()}, everybody in one run. Error is (predicted - measured)/measured"
        " in the row's own unit, step time or rate, the mean is of absolute errors, bias is the"
        " signed mean. The rows are those of [simulator-accuracy.md](simulator-accuracy.md) that"
        " both sides have words for; what a row leaves open (micro-batch, interleaving,"
        " recomputation) is filled in for everybody by the same rules. Every peer runs with the"
        " machines and efficiencies that it ships. Rows on which constants of ours were calibrated"
        " are marked; theirs are said below.",
        "## In all",
        markdown(TABLES["in all"], in_all(columns)),
        "## By source, our worst place first",
        markdown(TABLES["by source"], by_source(columns)),
        "## Evaluations per second",
        "Time and memory of the same layouts of GPT-3 175B on 1,536 devices (tensor and pipeline"
        " parallelism, micro-batch, recomputation, ZeRO 0 and 1), as many of"
        f" {LAYOUTS:,} as fit into {SECONDS:.0f} s, Python {platform.python_version()}, load"
        f" {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores. Our search evaluates"
        " as the first line does, for which layouts must be known beforehand;"
        " asked for one layout after the other, ours is not the fastest.",
        markdown(TABLES["speed"], speed_lines(speeds)),
        "## The peers",
    ]
    for peer, folder in peers:
        parts.append(f"**{peer.name}**, {peer.address}, commit {version(folder)}. {peer.about}")
        for column in columns:
            if column.name == peer.name:
                reasons = ", ".join(
                    f"{reason} ({count})" for reason, count in column.refused.most_common()
                )
                parts.append(f"Rows left out: {reasons or 'none'}. {published(column)}".strip())
    headings = ["row", "measured", "ours", *(column.name for column in columns)]
    parts += ["## Every row", markdown(headings, by_row(columns, rows))]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Compare with the peers that are here."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    for peer in PEERS:
        flag = f"--{peer.option.replace('_', '-')}"
        parser.add_argument(flag, type=Path, metavar="DIR", help=f"checkout of {peer.address}")
    parser.add_argument("--python", default=sys.executable, help="interpreter for the peers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    here = []
    for peer in PEERS:
        folder = getattr(options, peer.option)
        if folder is None:
            flag = f"--{peer.option.replace('_', '-')} DIR"
            console.print(f"{peer.name} skipped: {flag} names a checkout of {peer.address}")
        elif not folder.is_dir():
            parser.error(f"{folder} is no folder")
        else:
            here.append((peer, folder))
    if not here:
        return
    rows, configs = forecastable(), sweep()
    shared = {entry.ours.id: entry for entry in map(share, rows) if entry}
    columns: list[Column] = []
    speeds = our_speeds(configs)
    try:
        for peer, folder in here:
            answer = partial(ask, peer, folder, options.python)
            for name, settings in peer.variants.items():
                columns.append(compare(settings, rows, shared, answer, name))
            for name, settings in peer.sweeps.items():
                answers, seconds = answer([settings(config) for config in configs], SECONDS)
                speeds[name] = len(answers), seconds
    except PeerError as error:
        parser.error(str(error))
    show(console, "in all", TABLES["in all"], in_all(columns))
    show(console, "by source, our worst place first", TABLES["by source"], by_source(columns))
    show(console, "evaluations per second", TABLES["speed"], speed_lines(speeds))
    for column in columns:
        if sentence := published(column):
            console.print(sentence)
    if options.markdown:
        options.markdown.write_text(
            page(here, columns, list(shared.values()), speeds), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
