"""Dispatchers over nodes train the same model as one process does; `tests.drills.dispatchers` has
all of them."""

import pytest
from drills.dispatchers import MOST, WAYS, errors, pairs_left_out


@pytest.mark.distributed
def test_twenty_steps_equal_the_single_process():
    found = errors([WAYS[1], WAYS[5], WAYS[9]])
    assert {str(way): error for way, error in found.items() if not error < MOST} == {}


def test_every_two_axes_meet_in_all_their_values():
    assert pairs_left_out() == set()
