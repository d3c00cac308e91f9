"""What an engine takes around the operators of a decoding pass, where no device hides it."""

from __future__ import annotations

import numpy as np

from simulator.array import Array
from simulator.moesd import active_experts
from simulator.parameters import layer_counts
from simulator.serving import Serving

MICRO = 1e-6


def once_seconds(serving: Serving, sequences: Array = 0) -> Array:
    """For a pass over `sequences` sequences of one device, whatever the model's depth."""
    seconds: Array = serving.options.host_ms / 1e3
    if costs := serving.hardware.decoding:
        seconds = seconds + MICRO * (costs.whole_pass + costs.sequence * np.asarray(sequences))
    return seconds


def layers_seconds(serving: Serving, sequences: Array, new: Array) -> Array:
    """For all layers of a pass over `new` tokens of each of `sequences` sequences of one device:
    their Python, a call of attention for each sequence, and calls for each expert with tokens."""
    costs = serving.hardware.decoding
    if costs is None:
        return 0.0
    counts = layer_counts(serving.model)
    attention = np.where(np.asarray(new) > 1, costs.attention_of_several, costs.attention)
    micro = serving.model.num_layers * (costs.layer + attention * np.asarray(sequences))
    if counts["moe"]:
        tokens = np.asarray(sequences) * new * serving.attention_dp
        shared = costs.shared_expert if serving.model.shared_expert_ffn_hidden_size else 0.0
        each = costs.expert * touched_experts(serving, tokens)
        micro = micro + counts["moe"] * (costs.experts + shared + each)
    return MICRO * micro


def touched_experts(serving: Serving, tokens: Array) -> Array:
    """Experts that `tokens` wake in a layer, on the rank that has most of them; as was measured, in
    between by the logarithm of the tokens, where it was."""
    if serving.touched:
        known, touched = serving.touched
        return np.interp(np.log(np.maximum(tokens, 1)), np.log(known), touched) / serving.ep
    experts, top_k = serving.model.num_experts, serving.moe.top_k
    return active_experts(tokens, experts, top_k, chosen=serving.chosen, ranks=serving.ep)
