"""Where a run is: what a checkpoint must hold besides weights and optimizer moments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RunState:
    """Progress of a run; `step` counts the steps done, skipped ones included.

    `consumed_sequences` counts those of the current phase (each phase reads its own data order).
    """

    step: int = 0
    consumed_sequences: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0
