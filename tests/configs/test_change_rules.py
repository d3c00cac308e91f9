"""What may change when a run goes on from a checkpoint: every key is classified, by its kind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.change_rules import KINDS, changes, kind_of, leaves, refused
from configs.compose import load

KEYS = [key for key, _ in leaves(load([]))]


def test_every_key_of_the_tree_has_a_kind_and_every_entry_is_a_key() -> None:
    section = {key: f"{key.partition('.')[0]}.*" for key in KEYS}
    assert [key for key in KEYS if not {key, section[key]} & KINDS.keys()] == []
    assert {kind_of(key) for key in KEYS} == {"shape", "function", "data", "schedule", "free"}
    sections = {f"{key.partition('.')[0]}.*" for key in KEYS}
    assert {key for key in KINDS if key not in KEYS and key not in sections} == set()
    # No section of the model, the routing or the data by the lump: a new key there must be judged.
    assert not {"model.*", "moe.*", "data.*", "train.*"} & KINDS.keys()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["moe.top_k=8"], "moe.top_k"),
        (["moe=top_k"], "moe.router"),
        (["moe.num_expert_groups=2"], "moe.num_expert_groups"),
        (["moe.score_function=sigmoid"], "moe.score_function"),
        (["moe.scaling_factor=2"], "moe.scaling_factor"),
        (["model.norm_epsilon=1e-3"], "model.norm_epsilon"),
        (["model.rotary_base=500000"], "model.rotary_base"),
    ],
)
def test_another_function_is_refused_unless_its_key_is_named(overrides, key) -> None:
    then, now = load([]), load(overrides)
    found = changes(then, now)
    keys = [change.key for change in found]
    assert key in keys
    violations = refused(found, [], "step_00000002")
    assert [violation.key for violation in violations] == keys
    # What is proposed works, both ways.
    hint = violations[0].suggestion
    assert hint.endswith(f"checkpoint.allow_changes=[{','.join(keys)}]")
    assert refused(found, keys, "step_00000002") == []
    back = [violation.suggestion.partition(";")[0] for violation in violations]
    assert changes(then, load([*overrides, *back])) == []


def test_other_weights_are_refused_even_when_named() -> None:
    found = changes(load([]), load(["model.hidden_size=64", "moe.expert_bias=true"]))
    assert [(change.key, change.kind) for change in found] == [
        ("model.hidden_size", "shape"),
        ("moe.expert_bias", "shape"),
    ]
    left = refused(found, ["model.hidden_size", "moe.expert_bias"], "x")
    assert [violation.suggestion for violation in left] == [
        f"model.hidden_size={load([]).model.hidden_size}; or another run_dir",
        "moe.expert_bias=false; or another run_dir",
    ]


def test_data_and_schedule_are_said_and_what_concerns_nobody_is_silent() -> None:
    now = load(
        [
            *("seed=2", "optimizer.lr=1e-5", "moe.z_loss_coefficient=1"),
            *("data.num_workers=3", "train.log_every=9", "run_dir=x", "launch.processes=1"),
            "memory.recompute_granularity=full",
        ]
    )
    found = changes(load([]), now)
    assert refused(found, [], "x") == []
    assert sorted(map(str, found)) == [
        f"moe.z_loss_coefficient=1.0 (was {load([]).moe.z_loss_coefficient})",
        f"optimizer.lr=1e-05 (was {load([]).optimizer.lr})",
        "seed=2 (was 1234)",
    ]


def test_keys_that_say_nothing_for_this_model_do_not_count() -> None:
    dense = replace(load([]).model, num_experts=0)
    then = replace(load([]), model=dense)
    assert changes(then, replace(load(["moe=top_k"]), model=dense)) == []
    longer = replace(dense, max_position_embeddings=99)
    assert changes(then, replace(then, model=longer)) == []
    learned = replace(then, model=replace(dense, position_embedding="learned"))
    other = replace(learned, model=replace(learned.model, max_position_embeddings=99))
    assert [change.kind for change in changes(learned, other)] == ["shape"]
    base = replace(learned, model=replace(learned.model, rotary_base=7.0))
    assert changes(learned, base) == []
