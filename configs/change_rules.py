"""What may change between the run that wrote a checkpoint and the one that goes on from it.

Every key of the tree has a kind; a test holds that none is forgotten.

- shape: other weights. Refused.
- function: the same weights, of which the model would make something else. Refused, unless named in
  `checkpoint.allow_changes`.
- data: other tokens, or another order of them. Said in one line.
- schedule: how the weights are trained. Said in one line.
- free: where and how fast it runs, what is kept and shown, initial values. Silent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from configs.schema import Config
from configs.violation import Violation

Kind = Literal["shape", "function", "data", "schedule", "free"]

_KEYS: dict[Kind, str] = {
    "shape": """
        model.num_layers model.hidden_size model.num_attention_heads model.vocab_size
        model.ffn_hidden_size model.num_query_groups model.kv_channels
        model.max_position_embeddings model.attention model.q_lora_rank model.kv_lora_rank
        model.qk_head_dim model.qk_pos_emb_head_dim model.v_head_dim model.add_qkv_bias
        model.add_attention_output_bias model.qk_layernorm model.position_embedding
        model.activation model.add_mlp_bias model.normalization model.tie_embeddings
        model.num_experts model.moe_ffn_hidden_size model.shared_expert_ffn_hidden_size
        model.num_dense_layers model.mtp_num_layers model.leap_heads model.sandwich_norm
        model.patched_layers model.key_rounding model.lora_rank model.lora_modules
        model.input_transforms
        moe.router_scale moe.expert_bias moe.expert_parts moe.shared_parts
    """,
    "function": """
        model.rotary_base model.norm_epsilon model.activation_bits model.kv_bits model.leap_stride
        model.lora_alpha model.rope_scaling model.rope_factor model.rope_original_positions
        model.rope_fast model.rope_slow model.rope_attention_factor
        moe.router moe.top_k moe.num_expert_groups moe.topk_group moe.score_function
        moe.softmax_after_top_k moe.renormalize moe.scaling_factor moe.active_parts
    """,
    "data": """
        data.name data.blend data.blend_by data.validation_blend data.tokenizer
        data.reset_attention_mask data.reset_position_ids data.eod_mask_loss
        train.validation_batches seed
    """,
    "schedule": """
        optimizer.* moe.expert_bias_update_rate moe.aux_loss_scope moe.aux_loss_coefficient
        moe.z_loss_coefficient moe.capacity_factor moe.dispatch_dtype moe.combine_dtype
        model.mtp_loss_scaling_factor model.lora_dropout backend.precision train.steps
        train.micro_batch_size train.global_batch_size train.seq_length train.leap_heads_only
    """,
    "free": """
        model.name model.init model.init_std model.sandwich_attention_gain model.sandwich_mlp_gain
        moe.dispatcher moe.dispatch_chunks moe.placement moe.placement_period
        moe.placement_threshold parallel.* memory.* data.cache_dir data.verify data.num_workers
        backend.name backend.threads backend.peak_tflops engine.* launch.* train.validate_every
        train.log_every train.max_skipped_steps train.max_rollbacks checkpoint.* watch.* profile.*
        simulation.* inference.* hardware devices run_dir
    """,
}
KINDS: dict[str, Kind] = {key: kind for kind, keys in _KEYS.items() for key in keys.split()}
# What `checkpoint.allow_changes` may name. Of the tokenizer the content is compared, not the path.
ALLOWABLE = (*(key for key, kind in KINDS.items() if kind == "function"), "data.tokenizer")

# Keys that only say something where this holds; a section stands for its keys.
_APPLIES: dict[str, Callable[[Config], bool]] = {
    "moe": lambda config: config.model.num_experts > 0,
    "model.max_position_embeddings": lambda config: config.model.position_embedding == "learned",
    "model.leap_stride": lambda config: config.model.leap_heads > 0,
    "moe.shared_parts": lambda config: config.moe.expert_parts > 0,
    "moe.active_parts": lambda config: config.moe.expert_parts > 0,
    "model.lora_alpha": lambda config: config.model.lora_rank > 0,
    "model.lora_modules": lambda config: config.model.lora_rank > 0,
    "model.lora_dropout": lambda config: config.model.lora_rank > 0,
    "model.rotary_base": lambda config: config.model.position_embedding == "rope",
    **dict.fromkeys(
        (
            "model.rope_factor",
            "model.rope_original_positions",
            "model.rope_fast",
            "model.rope_slow",
        ),
        lambda config: config.model.rope_scaling != "none",
    ),
}
_LONGEST = 60  # characters of a value that are shown


@dataclass(frozen=True)
class Change:
    """A key whose value is another than the checkpoint's."""

    key: str
    kind: Kind
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}={_shown(self.now)} (was {_shown(self.then)})"


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a configuration and its value; lists and mappings are values."""
    for field in fields(tree):
        value = getattr(tree, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def kind_of(key: str) -> Kind:
    """The kind of a key, by its own entry or its section's; one that was forgotten may change the
    function."""
    return KINDS.get(key) or KINDS.get(f"{key.partition('.')[0]}.*", "function")


def changes(then: Config, now: Config) -> list[Change]:
    """What the run that wrote a checkpoint did differently, `free` keys left out."""
    before = dict(leaves(then))
    begun, said = set(), set()  # what may be added to a model that has none
    if then.model.leap_heads == 0:  # heads begin as copies of the model's own
        begun, said = {"model.leap_heads", "model.leap_stride"}, {"model.leap_heads"}
    if then.model.lora_rank == 0:  # adapters begin at zero
        begun |= {key for key in KINDS if key.startswith("model.lora_")}
        said |= {"model.lora_rank"}
    return [
        Change(key, "schedule" if key in begun else kind, before[key], value)
        for key, value in leaves(now)
        if (kind := kind_of(key)) != "free"
        and not (key in begun and key not in said)
        and before[key] != value
        and (_applies(key, then) or _applies(key, now))
    ]


def begins_stage(then: Config, now: Config) -> bool:
    """Whether other weights are trained than before: L-MTP's heads where there were none, or
    alone, or no longer alone; adapters. The optimizer then starts from nothing."""

    def trained(config: Config) -> tuple[int, bool, int]:
        return config.model.leap_heads, config.train.leap_heads_only, config.model.lora_rank

    return trained(then) != trained(now)


def refused(found: list[Change], allowed: list[str], checkpoint: str) -> list[Violation]:
    """The changes with which a run cannot go on from `checkpoint`."""
    function = [change for change in found if change.kind == "function"]
    names = ",".join(
        dict.fromkeys([*allowed, *(c.key for c in function if not _allows(allowed, c))])
    )
    instead = {
        "shape": "another run_dir",
        "function": f"to go on all the same, checkpoint.allow_changes=[{names}]",
    }
    return [
        Violation(
            change.key,
            change.now,
            f"the checkpoint {checkpoint} has {_shown(change.then)}",
            f"{change.key}={_shown(change.then)}; or {instead[change.kind]}",
        )
        for change in found
        if change.kind in instead and not _allows(allowed, change)
    ]


def _allows(allowed: list[str], change: Change) -> bool:
    """Other weights cannot be allowed: there is nothing to fill them with."""
    return change.kind != "shape" and change.key in allowed


def _applies(key: str, config: Config) -> bool:
    names = (key, key.partition(".")[0])
    return all(_APPLIES[name](config) for name in names if name in _APPLIES)


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
