"""Speed-up of speculative decoding against batch, for several sparsities, dense beside them."""

from __future__ import annotations

from pathlib import Path

from simulator.plot_file import plotted
from simulator.speculation import Curve


def speedup_plot(path: Path, curves: list[Curve], dense: list[Curve]) -> None:
    """Write the plot, a panel for each machine and draft length; its format is that of the file's
    name.

    Raises:
        ConfigError: another format.
    """
    machines = list(dict.fromkeys(each.serving.hardware.name for each in curves))
    lengths = list(dict.fromkeys(each.draft_tokens for each in curves))
    size = (1.5 + 4.5 * len(machines), 0.8 + 3.6 * len(lengths))
    grid = {"nrows": len(lengths), "ncols": len(machines), "sharey": "row", "squeeze": False}
    with plotted(path, figsize=size, **grid) as (figure, panels):
        for row, length in zip(panels, lengths, strict=True):
            for axes, machine in zip(row, machines, strict=True):
                here = [
                    each
                    for each in [*curves, *dense]
                    if (each.serving.hardware.name, each.draft_tokens) == (machine, length)
                ]
                for each in here:
                    _draw(axes, each)
                axes.set_title(f"{here[0].serving.devices} × {machine}, γ = {length}")
                axes.axhline(1.0, color="grey", linewidth=0.8)
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter("{x:.0f}")
                axes.grid(alpha=0.3)
                axes.set_xlabel("batch, sequences")
        for row in panels:
            row[0].set_ylabel("speed-up over plain decoding")
        panels[0][-1].legend()
        figure.suptitle(curves[0].serving.model.name)


def _draw(axes, each: Curve) -> None:  # type: ignore[no-untyped-def]
    sparse = each.serving.model.num_experts > 0
    label = f"K = {each.serving.moe.top_k}" if sparse else "dense, as many active parameters"
    style = {} if sparse else {"color": "black", "linestyle": "--"}
    axes.plot(each.batch, each.times.speedup, marker=".", label=label, **style)
