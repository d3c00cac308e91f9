"""Dispatchers over nodes train the same model as one process does; `tests.drills.dispatchers` has
all of them."""

import pytest
from drills.dispatchers import MOST, errors

SHORT = {
    "moge": ["hierarchical, recomputed", "deduplicated, sliced experts"],
    "top_k": ["hierarchical, tensor parallel"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("router", SHORT)
def test_twenty_steps_equal_the_single_process(router):
    found = errors(router, SHORT[router])
    assert found.keys() == set(SHORT[router])
    assert {name: error for name, error in found.items() if not error < MOST} == {}
