"""Which experts the router chose lately: the heat map's data, and experts that nobody chose."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from configs.schema import MoEConfig
from pangu.moe.load import dead_experts
from pangu.report.run_files import EXPERT_LOAD, ExpertLoad

_ENOUGH_CHOICES = 20  # per expert on average; fewer say nothing about an expert without any
_NAMED_LAYERS = 8  # in a warning; a router that collapsed has dead experts everywhere


class LoadWindow:
    """Choices of every expert in the current interval of steps and the one before it."""

    def __init__(self, run_dir: Path, moe: MoEConfig, *, active: bool) -> None:
        self._path = run_dir / EXPERT_LOAD
        self._active = active
        self._moe = moe
        self._groups = moe.equal_groups
        self._before: dict[int, torch.Tensor] = {}
        self._current: dict[int, torch.Tensor] = {}
        self._first_step = self._current_first = self._last_step = 0

    def add(self, step: int, counts: dict[int, torch.Tensor]) -> None:
        """Count one step's choices, int64 `[experts]` by layer."""
        if not self._current:
            self._current_first = step
            self._first_step = self._first_step or step
        self._last_step = step
        self._current = _sum(self._current, counts)

    def end_interval(self, biases: dict[int, list[float]] | None = None) -> str:
        """Write the heat map's data, with the experts' balancing biases by layer, and start a new
        interval.

        Returns:
            A sentence naming the experts that no token chose in the interval; "" without any.
        """
        if not self._current:
            return ""
        window = _sum(self._before, self._current)
        counts = {layer: values.tolist() for layer, values in window.items()}
        if self._active:
            steps_and_groups = self._first_step, self._last_step, self._groups
            self._write(ExpertLoad(*steps_and_groups, counts, biases or {}))
        dead = {} if _few(self._current) else dead_experts(self._current)
        steps = f"steps {self._current_first}–{self._last_step}"
        self._before, self._current = self._current, {}
        self._first_step = self._current_first
        return f"{_name(dead, steps)}. {_advice(self._moe)}" if dead else ""

    def _write(self, load: ExpertLoad) -> None:
        try:
            load.write(self._path)
        except OSError as error:  # a full disk costs the plot, not the run
            line = f"warning: {self._path} cannot be written: {error.strerror}"
            print(line, file=sys.stderr)


def _few(counts: dict[int, torch.Tensor]) -> bool:
    """Whether an expert may have no token by chance."""
    return any(values.float().mean() < _ENOUGH_CHOICES for values in counts.values())


def _sum(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {layer: a[layer] + values if layer in a else values for layer, values in b.items()}


def _advice(moe: MoEConfig) -> str:
    """What to do about experts that the router has forgotten."""
    if moe.expert_bias:
        rate = f"moe.expert_bias_update_rate (now {moe.expert_bias_update_rate:g})"
        return f"To bring them back: a larger {rate}, or a lower optimizer.lr"
    coefficient = f"moe.aux_loss_coefficient (now {moe.aux_loss_coefficient:g})"
    return (
        f"To bring them back: a larger {coefficient}, moe.expert_bias=true, or a lower optimizer.lr"
    )


def _name(dead: dict[int, list[int]], steps: str) -> str:
    parts = [
        f"layer {layer} expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"
        for layer, experts in list(dead.items())[:_NAMED_LAYERS]
    ]
    if len(dead) > _NAMED_LAYERS:
        parts.append(f"and {len(dead) - _NAMED_LAYERS} more layers")
    return f"dead experts, chosen by no token in {steps}: {'; '.join(parts)}"
