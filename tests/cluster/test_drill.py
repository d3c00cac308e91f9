"""The drill of `tests/drills/cluster.py` with one event of its twenty."""

from pathlib import Path

import pytest

from cluster.privileges import needs_cluster
from tests.drills.cluster import KINDS, Event, drill, events

pytestmark = [pytest.mark.distributed, pytest.mark.end_to_end, needs_cluster]


def test_a_node_that_dies_and_comes_back_costs_nothing_but_time(tmp_path: Path) -> None:
    said: list[str] = []
    assert drill([Event("kill node", 1)], tmp_path, said.append) == [], "\n".join(said)
    assert len(said) == 3


def test_twenty_events_are_the_same_each_time_and_every_kind_comes_five_times() -> None:
    twenty = events(20, seed=1)
    assert twenty == events(20, seed=1) != events(20, seed=2)
    assert sorted(event.kind for event in twenty) == sorted(KINDS * 5)
