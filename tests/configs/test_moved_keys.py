"""Keys that were: a sentence names what says it now."""

from __future__ import annotations

import pytest

from configs.check import examine, load_checked
from configs.compose import load
from configs.violation import ConfigError

MOVED = [("simulation.dispatch=hierarchical", "moe.dispatcher=")]


@pytest.mark.parametrize(("old", "new"), MOVED)
def test_an_old_key_names_the_new_one(old, new):
    with pytest.raises(ConfigError) as refused:
        load([old])
    (violation,) = refused.value.violations
    assert violation.key == old.partition("=")[0]
    assert new in violation.suggestion


@pytest.mark.parametrize("kind", ["hierarchical"])
def test_what_the_trainer_has_not_got_the_simulator_plans(kind):
    override = f"moe.dispatcher={kind}"
    _, (violation,) = examine([override])
    assert violation.key == "moe.dispatcher"
    assert "moe.dispatcher=auto" in violation.suggestion
    assert load_checked([override], purpose="plan").moe.dispatcher == kind
