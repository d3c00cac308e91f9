"""Rotary positions beyond the length that a model was trained at: channels that turn slowly are
slowed down by a factor, fast ones stay, those between are mixed.

YaRN (arXiv 2309.00071, section 3.2) places the border by channel, between so many turns over the
original length; Llama 3.1 by frequency, between the same two numbers of turns.
"""

from __future__ import annotations

import math

import torch

from configs.schema import ModelConfig


def scaled_frequencies(plain: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """The angle by which each pair of channels turns from one position to the next, `[size / 2]`,
    of those without scaling."""
    if model.rope_scaling == "none":
        return plain
    fast, slow, length = model.rope_fast, model.rope_slow, model.rope_original_positions
    if model.rope_scaling == "llama3":
        turns = plain * length / (2 * math.pi)
        kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
    else:
        size = 2 * len(plain)

        def channel(turns: float) -> float:
            """The pair that turns so often over the original length, not rounded."""
            wave = length / (turns * 2 * math.pi)
            return size * math.log(wave) / (2 * math.log(model.rotary_base))

        first = max(math.floor(channel(fast)), 0)
        last = min(math.ceil(channel(slow)), size - 1)
        pairs = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
        kept = 1 - ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
    return plain * kept + plain / model.rope_factor * (1 - kept)
