"""Schedules: closed forms against published formulas and against the event timeline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.layout import SCHEDULES, Layout
from simulator.pipeline import Ranks, RankSeconds, pipeline_seconds
from simulator.timeline import UnitSeconds, build, interleaved_order


def layout(p: int, m: int, v: int = 1, schedule: str = "1f1b") -> Layout:
    return Layout(pp=p, vpp=v, num_microbatches=m, schedule=SCHEDULES.index(schedule))


def both(chosen: Layout, units: list[list[UnitSeconds]], send: float = 0.0) -> tuple[float, float]:
    """Seconds by events and in closed form."""
    ranks = [
        (
            Ranks(rank, 1),
            RankSeconds(*(sum(getattr(u, name) for u in chunks) for name in vars(chunks[0]))),
        )
        for rank, chunks in enumerate(units)
    ]
    return build(chosen, units, send).seconds, float(pipeline_seconds(chosen, ranks, send))


def even(p: int, v: int = 1, f: float = 1.0, b: float = 1.0, w: float = 1.0, h: float = 0.0):
    return [[UnitSeconds(f / v, b / v, w / v, h / v) for _ in range(v)] for _ in range(p)]


@pytest.mark.parametrize(("p", "m"), [(1, 4), (2, 2), (4, 8), (8, 32), (4, 2)])
def test_one_forward_one_backward(p, m):
    """m(f+b) + (p-1)(f+b), exactly."""
    events, closed = both(layout(p, m), even(p))
    assert events == pytest.approx(3 * (m + p - 1))
    assert closed == pytest.approx(events)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 8)])
def test_gpipe(p, m):
    events, closed = both(layout(p, m, schedule="gpipe"), even(p))
    assert events == pytest.approx(3 * (m + p - 1))
    assert closed == pytest.approx(events)


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 4), (4, 2, 8), (4, 3, 16), (8, 6, 16)])
def test_interleaving_divides_the_bubble(p, v, m):
    """m(f+b) + (p-1)(f+b)/v."""
    events, closed = both(layout(p, m, v), even(p, v))
    assert events == pytest.approx(3 * (m + (p - 1) / v))
    assert closed == pytest.approx(events)


def test_pangu_ultra_dense_bubble():
    """7/23 -> 7/103 of a step for p = 8, m = 16, v = 6."""
    for v, fraction in ((1, 7 / 23), (6, 7 / 103)):
        events, _ = both(layout(8, 16, v), even(8, v))
        assert 1 - 16 * 3 / events == pytest.approx(fraction)


@pytest.mark.parametrize(("p", "m"), [(2, 8), (4, 16), (8, 32)])
def test_zero_bubble(p, m):
    """ZB-H1's bubble: (p-1)(f + b - w)."""
    events, closed = both(layout(p, m, schedule="zero_bubble"), even(p, f=1.0, b=1.0, w=0.8))
    assert closed == pytest.approx(m * 2.8 + (p - 1) * 1.2)
    assert events == pytest.approx(closed, rel=0.02)


def test_sends_delay_1f1b_and_hide_under_interleaving():
    plain, closed = both(layout(4, 16), even(4), 0.05)
    assert plain == pytest.approx(closed, rel=0.02)
    assert plain > both(layout(4, 16), even(4))[0] + 16 * 0.05
    virtual, closed = both(layout(4, 16, 2), even(4, 2), 0.05)
    assert virtual == pytest.approx(closed, rel=0.02)


def test_uneven_stages_wait_for_the_slowest():
    units = [[UnitSeconds(f, f, f)] for f in (1.0, 1.5, 1.0, 1.2)]
    events, closed = both(layout(4, 16), units)
    assert events == pytest.approx(closed, rel=0.03)
    assert events >= 16 * 4.5


def test_overlap_hides_expert_communication_in_the_steady_state():
    p, v, m = 4, 2, 32
    overlapped = replace(layout(p, m, v), overlap_expert_parallel=True)
    shown, _ = both(overlapped, even(p, v, h=0.0))
    hidden, closed = both(overlapped, even(p, v, h=0.6))
    assert hidden == pytest.approx(closed, rel=0.03)
    assert shown - hidden == pytest.approx(0.6 * m, rel=0.25)


def test_every_pass_runs_once_and_in_order():
    for rank in range(4):
        order = interleaved_order(4, 2, 8, rank)
        assert len(order) == len(set(order)) == 2 * 2 * 8
        for unit in order:
            if unit[0] == "B":
                assert order.index(("F", *unit[1:])) < order.index(unit)


def test_micro_batches_left_over_by_interleaving_cost_as_much():
    """18 micro-batches through 4 ranks: two more than 4 groups of 4."""
    part, _ = both(layout(4, 18, 2), even(4, 2))
    assert part == pytest.approx(both(layout(4, 16, 2), even(4, 2))[0] + 2 * 3)


def test_long_schedules_continue_the_steady_state():
    events, _ = both(layout(8, 20_000), even(8))
    assert events == pytest.approx(3 * (20_000 + 7))
