"""What the terminal shows when a run has ended."""

from __future__ import annotations

from pathlib import Path

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pangu.report.run_data import RunData
from pangu.violation_table import console


def print_summary(run: RunData, files: list[Path]) -> None:
    """Losses beside those of the n-gram models, the sample, and where the plots are."""
    out = console()
    out.print()
    out.print(loss_table(run))
    if run.sample:
        sample = _printable(run.sample).strip() or "(nothing: the model ended the document at once)"
        out.print(Panel(Text(sample), title="a sample", title_align="left"))
    for path in files:
        out.print(Text(str(path)))


def _printable(text: str) -> str:
    """Without control characters: an untrained model's bytes must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def loss_table(run: RunData) -> Table:
    """One row per model, the trained one first."""
    title = f"{run.name} after {run.steps[-1]['step']:,} steps: loss in nats per token, perplexity"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("training loss", "perplexity", "held-out loss", "perplexity"):
        table.add_column(column, justify="right")
    for number, one in enumerate(run.losses()):
        table.add_row(one.name, *one.cells(), style="bold" if number == 0 else "")
    return table
