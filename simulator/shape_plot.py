"""Throughput of a shape search against what its shapes learn."""

from __future__ import annotations

from pathlib import Path

from configs.schema import Config
from simulator.plot_file import plotted
from simulator.shape import Goal, Shape, ShapeResult


def pareto_plot(path: Path, config: Config, goal: Goal, result: ShapeResult) -> None:
    """Write the plot; its format is that of the file's name.

    Raises:
        ConfigError: another format.
    """
    with plotted(path, figsize=(8, 5)) as (figure, axes):
        learnt = [_learnt(s) for s in result.shapes]
        rates = [s.tokens_per_second_per_device for s in result.shapes]
        colors = [s.parameters / 1e9 for s in result.shapes]
        dots = axes.scatter(learnt, rates, c=colors, cmap="viridis", s=26, zorder=3)
        figure.colorbar(dots, label="total parameters, billions")
        front = [(_learnt(s), s.tokens_per_second_per_device) for s in result.pareto]
        axes.plot(*zip(*front, strict=True), color="tab:orange", label="Pareto front")
        if result.own:
            own = result.own
            axes.scatter(
                [_learnt(own)],
                [own.tokens_per_second_per_device],
                marker="*",
                s=220,
                color="tab:red",
                edgecolor="white",
                zorder=4,
                label=f"{config.model.name} itself",
            )
        limit = config.inference.latency_limit_ms
        within = f" within {limit:g} ms per token" if goal == "inference" and limit else ""
        assert config.hardware is not None
        axes.set_title(f"{goal} on {config.world_size} × {config.hardware['name']}{within}")
        known = result.shapes[0].loss is not None
        axes.set_xlabel("expected loss, nats per token" if known else "active parameters, billions")
        axes.set_ylabel("tokens/s per device")
        axes.grid(alpha=0.3)
        axes.legend()


def _learnt(shape: Shape) -> float:
    return shape.active / 1e9 if shape.loss is None else shape.loss
