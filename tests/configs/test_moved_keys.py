"""Keys that were: a sentence names what says it now."""

from __future__ import annotations

import pytest

from configs.check import examine, load_checked
from configs.compose import load
from configs.violation import ConfigError

MOVED = [
    ("simulation.dispatch=hierarchical", "moe.dispatcher="),
    ("simulation.swap_modules=[moe_act]", "memory.swap"),
    ("simulation.swap_optimizer=true", "memory.swap_optimizer"),
    ("parallel.schedule=1f1b_overlap", "parallel.overlap_expert_parallel=true"),
]


@pytest.mark.parametrize(("old", "new"), MOVED)
def test_an_old_key_names_the_new_one(old, new):
    with pytest.raises(ConfigError) as refused:
        load([old])
    (violation,) = refused.value.violations
    assert violation.key == old.partition("=")[0]
    assert new in violation.suggestion


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("moe.dispatcher=hierarchical", "moe.dispatcher=auto"),
        ("parallel.overlap_expert_parallel=true", "parallel.overlap_expert_parallel=false"),
        ("memory.swap=[moe_act]", "memory.swap=[]"),
        ("memory.swap_optimizer=true", "memory.swap_optimizer=false"),
    ],
)
def test_what_the_trainer_has_not_got_the_simulator_plans(override, instead):
    _, (violation,) = examine([override])
    assert violation.key == override.partition("=")[0]
    assert instead in violation.suggestion
    load_checked([override], purpose="plan")
