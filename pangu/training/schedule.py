"""Learning rate and batch shape as functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.schema import Config, Phase


@dataclass(frozen=True)
class PhaseAt:
    """The phase of a step, and the step that it starts with."""

    phase: Phase
    first_step: int


def phases(config: Config) -> list[Phase]:
    """The run's phases; a run without any is one phase."""
    if config.optimizer.phases:
        return config.optimizer.phases
    o = config.optimizer
    return [Phase("train", config.train.steps, o.lr, o.min_lr, o.schedule, o.warmup_steps)]


def phase_at(config: Config, step: int) -> PhaseAt:
    """The phase that step `step` (from 0) belongs to; the last one goes on for ever."""
    first_step = 0
    everything = phases(config)
    for phase in everything[:-1]:
        if step < first_step + phase.steps:
            break
        first_step += phase.steps
    else:
        phase = everything[-1]
    return PhaseAt(phase, first_step)


def global_batch_size(config: Config, phase: Phase) -> int:
    """Sequences per step of a phase."""
    return phase.global_batch_size or config.train.global_batch_size


def seq_length(config: Config, phase: Phase) -> int:
    """Tokens per sequence of a phase."""
    return phase.seq_length or config.train.seq_length


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of step `step` (from 0).

    cosine: from lr to min_lr over the phase. wsd: constant, then linear to min_lr over the last
    `decay_steps` (a tenth of the phase by default). constant: lr. Each after a linear warm-up.
    """
    at = phase_at(config, step)
    phase, i = at.phase, step - at.first_step
    if i < phase.warmup_steps:
        return phase.lr * (i + 1) / phase.warmup_steps
    if phase.schedule == "constant":
        return phase.lr
    if phase.schedule == "cosine":
        span = max(1, phase.steps - phase.warmup_steps)
        progress = min(1.0, (i - phase.warmup_steps) / span)
        return phase.min_lr + (phase.lr - phase.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = config.optimizer.decay_steps or max(1, phase.steps // 10)
    left = min(1.0, max(0.0, (phase.steps - i) / decay))
    return phase.min_lr + (phase.lr - phase.min_lr) * left
