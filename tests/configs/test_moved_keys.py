"""Keys that were: a sentence names what says it now."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import yaml

from configs.check import examine, load_checked
from configs.compose import load, read_file
from configs.violation import ConfigError

MOVED = [
    ("simulation.dispatch=hierarchical", "moe.dispatcher="),
    ("simulation.swap_modules=[moe_act]", "memory.swap"),
    ("simulation.swap_optimizer=true", "memory.swap_optimizer"),
    ("inference.input_length=9", "inference.prompt_length"),
    ("inference.output_length=9", "inference.max_new_tokens"),
    ("parallel.schedule=1f1b_overlap", "parallel.overlap_expert_parallel=true"),
]


@pytest.mark.parametrize(("old", "new"), MOVED)
def test_an_old_key_names_the_new_one(old, new):
    with pytest.raises(ConfigError) as refused:
        load([old])
    (violation,) = refused.value.violations
    assert violation.key == old.partition("=")[0]
    assert new in violation.suggestion


def test_a_run_that_was_saved_with_old_keys_can_be_read(tmp_path):
    config = load(["train.steps=7"])
    tree = asdict(config)
    tree["simulation"] |= {"dispatch": "flat", "swap_modules": [], "swap_optimizer": False}
    tree["inference"] |= {"input_length": 9, "output_length": 9}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert read_file(file, "checkpoint") == config


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("parallel.zero_stage=3", "parallel.zero_stage=0 or 1"),
        ("memory.swap_optimizer=true", "memory.swap_optimizer=false"),
    ],
)
def test_what_the_trainer_has_not_got_the_simulator_plans(override, instead):
    _, (violation,) = examine([override])
    assert violation.key == override.partition("=")[0]
    assert instead in violation.suggestion
    load_checked([override], purpose="plan")
