"""How config.json describes rotary positions that are scaled, and our keys for it."""

from __future__ import annotations

import math
from typing import Any

from configs.schema import ModelConfig
from pangu.checkpoint.tensor_files import WeightsError

Fields = dict[str, Any]


def parameters(fields: Fields) -> tuple[Fields, str]:
    """What a config.json says of them, in the old place or the new one, and the kind.

    Raises:
        WeightsError: it is no table.
    """
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise WeightsError("config.json: rope_scaling is no table")
    return rope, str(rope.get("rope_type", rope.get("type", "default")))


def ours(fields: Fields, *, latent: bool) -> Fields:
    """Keys of `ModelConfig`; none where nothing is scaled.

    Raises:
        WeightsError: with latent attention, where a factor is for the turning channels alone.
        KeyError: a field is missing.
    """
    rope, kind = parameters(fields)
    if kind == "default":
        return {}
    factor = float(rope["factor"])
    found = {
        "rope_scaling": kind,
        "rope_factor": factor,
        "rope_original_positions": int(rope["original_max_position_embeddings"]),
    }
    if kind == "llama3":
        slow, fast = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return found | {"rope_slow": slow, "rope_fast": fast}
    found["rope_fast"] = float(rope.get("beta_fast") or 32)
    found["rope_slow"] = float(rope.get("beta_slow") or 1)
    turned, every = rope.get("mscale"), rope.get("mscale_all_dim")
    attention = rope.get("attention_factor")
    if attention is None:
        both = _temperature(factor, turned) / _temperature(factor, every) if turned and every else 0
        attention = both or _temperature(factor, 1.0)
    if not latent:
        return found | {"rope_attention_factor": float(attention)}
    if abs(attention - 1) > 1e-9:
        raise WeightsError(
            "config.json: YaRN multiplies the turning channels alone (mscale is not "
            "mscale_all_dim): not supported with latent attention"
        )
    # Of all channels; rounded, so that it comes back the same from `theirs`.
    return found | {"rope_attention_factor": round(_temperature(factor, every or 0.0), 9)}


def theirs(model: ModelConfig) -> Fields:
    """`rope_scaling` of a config.json."""
    found = {
        "rope_type": model.rope_scaling,
        "factor": model.rope_factor,
        "original_max_position_embeddings": model.rope_original_positions,
    }
    if model.rope_scaling == "llama3":
        return found | {"low_freq_factor": model.rope_slow, "high_freq_factor": model.rope_fast}
    found |= {"beta_fast": model.rope_fast, "beta_slow": model.rope_slow}
    if model.attention != "mla":
        return found | {"attention_factor": model.rope_attention_factor}
    if 1 in (model.rope_attention_factor, model.rope_factor):
        return found | {"attention_factor": 1.0}
    scale = round((model.rope_attention_factor - 1) / (0.1 * math.log(model.rope_factor)), 7)
    return found | {"mscale": scale, "mscale_all_dim": scale}


def _temperature(factor: float, scale: float) -> float:
    """0.1·scale·ln(factor) + 1 (arXiv 2309.00071, section 3.4, and its scale in DeepSeek's)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
