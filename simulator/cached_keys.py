"""What a device keeps of a token for attention: keys and values, or MLA's latents."""

from __future__ import annotations

from simulator.hardware import ELEMENT_BYTES
from simulator.parameters import qk_size, query_groups, v_size
from simulator.serving import Serving


def cache_bytes_per_token(serving: Serving) -> float:
    """One layer's keys and values of one token on one device."""
    model = serving.model
    element = ELEMENT_BYTES[serving.options.kv_dtype]
    if keeps_latents(serving):
        return (model.kv_lora_rank + model.qk_pos_emb_head_dim) * element
    return kept_heads(serving) * (qk_size(model) + v_size(model)) * element


def keeps_latents(serving: Serving) -> bool:
    """Whether MLA's latents are all that the cache has, as our engine has it: not where keys and
    values are rounded, the projection up is more than a matrix, or ranks divide the sequence,
    which experts over tensor-parallel ranks want."""
    model, parallel = serving.model, serving.config.parallel
    rounded = model.kv_bits or model.activation_bits or model.input_transforms
    adapted = model.lora_rank and "linear_kv_up_proj" in model.lora_modules
    divided = serving.tp > 1 and model.num_experts and parallel.sequence_parallel
    return model.attention == "mla" and not (rounded or adapted or divided)


def kept_heads(serving: Serving) -> float:
    """Heads of keys and values that a device keeps where it keeps them whole; MLA has as many as
    of queries."""
    model = serving.model
    heads = model.num_attention_heads if model.attention == "mla" else query_groups(model)
    return max(heads / serving.tp, 1)
