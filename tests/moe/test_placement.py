"""Planning where experts are, against an exhaustive search and against what may not happen."""

from itertools import combinations

import numpy as np
import pytest

from pangu.moe.placement import average, device_load_cv, plan


def splits(experts: frozenset[int], ranks: int):
    """Every way to give each rank as many of the experts, ranks being alike."""
    if ranks == 1:
        yield [sorted(experts)]
        return
    first, *others = sorted(experts)
    for chosen in combinations(others, len(experts) // ranks - 1):
        mine = {first, *chosen}
        for rest in splits(experts - mine, ranks - 1):
            yield [sorted(mine), *rest]


def exact(loads: np.ndarray, ranks: int) -> float:
    """The least coefficient of variation of device loads that there is."""
    everything = frozenset(range(len(loads)))
    return min(
        np.std(sums) / np.mean(sums)
        for split in splits(everything, ranks)
        for sums in [[loads[part].sum() for part in split]]
    )


@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (8, 4), (12, 3)])
def test_greedy_is_near_the_exact_plan_and_far_from_where_it_starts(experts, ranks):
    draw = np.random.default_rng(experts + ranks)
    home, wins, loses = np.arange(experts), [], []
    for _ in range(5):
        loads = draw.permutation(1000 / np.arange(1, experts + 1)) * draw.uniform(0.8, 1.2, experts)
        found = device_load_cv(loads, plan(loads, home, ranks, groups=1), ranks)
        best = exact(loads, ranks)
        assert found >= best - 1e-12
        loses.append(found - best)
        wins.append(device_load_cv(loads, home, ranks) - found)
    assert np.mean(loses) < 0.08
    assert np.mean(wins) > 0.05


def test_an_expert_that_stays_keeps_its_slot_and_alike_loads_plan_alike():
    loads = np.array([9.0, 8, 1, 1, 1, 1])
    order = plan(loads, np.arange(6), 2, groups=1)
    assert sorted(order.tolist()) == list(range(6))
    assert device_load_cv(loads, order, 2) < device_load_cv(loads, np.arange(6), 2)
    rank = np.arange(6) // 3
    stay = rank[order] == rank
    assert (order[stay] == np.arange(6)[stay]).all()
    assert 0 < stay.sum() < 6
    assert (plan(loads, order, 2, groups=1) == order).all()


@pytest.mark.parametrize(("groups", "ranks"), [(4, 2), (4, 4), (2, 4), (4, 6)])
def test_ranks_that_hold_whole_groups_still_do(groups, ranks):
    experts = 24
    loads = np.random.default_rng(0).exponential(size=experts)
    order = plan(loads, np.arange(experts), ranks, groups)
    blocks = np.gcd(groups, ranks)
    for number, block in enumerate(order.reshape(blocks, -1)):
        assert set(block * blocks // experts) == {number}
    moved = (order != np.arange(experts)).any()
    assert moved == (blocks < ranks)


def test_moving_average_starts_with_the_first_step():
    first, second = np.array([4.0, 0.0]), np.array([0.0, 10.0])
    assert average(None, first).tolist() == [4, 0]
    assert average(first, second) == pytest.approx([3.6, 1.0])
