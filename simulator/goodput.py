"""Useful time of a long run on many devices that fail.

Failures arrive at random (exponential) at a rate proportional to the number of devices. A run
alternates work and checkpoints; a failure costs the work since the last checkpoint and a restart,
during which more failures may happen. The exact expectation is Daly's (2006): with M the mean time
between failures, R restart, C checkpoint and T work between checkpoints,

    E[time of one interval] = M · e^(R/M) · (e^((T + C)/M) - 1)

so that goodput = T / E. Its best T solves e^((T+C)/M) · (1 - T/M) = 1; Young's first-order answer
is sqrt(2·C·M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.violation import ConfigError, Violation

Array = Any


@dataclass(frozen=True)
class Goodput:
    """Arrays over the number of devices; times in seconds, shares of wall time."""

    devices: Array
    mtbf: Array  # mean time between failures of the whole run
    interval: Array  # work between checkpoints
    young: Array  # sqrt(2·C·M)
    daly: Array  # Daly's higher-order estimate
    goodput: Array
    checkpointing: Array
    lost_work: Array
    restarting: Array
    failures_per_day: Array


def goodput(
    devices: Array,
    device_mtbf_hours: float,
    checkpoint_seconds: float,
    restart_seconds: float,
    interval_seconds: float | None = None,
) -> Goodput:
    """Useful share of wall time, with the best checkpoint interval unless one is given.

    `checkpoint_seconds` is how long training stands still for one checkpoint (with asynchronous
    saving, only the copy to host memory).

    Raises:
        ConfigError: with every time or number that cannot be.
    """
    given = {
        "devices": devices,
        "device_mtbf_hours": device_mtbf_hours,
        "checkpoint_seconds": checkpoint_seconds,
        "restart_seconds": restart_seconds,
    }
    if interval_seconds is not None:
        given["interval_seconds"] = interval_seconds
    wrong = [
        Violation(name, value, "must be a positive, finite number")
        for name, value in given.items()
        if not np.all(np.isfinite(value) & (np.asarray(value) > 0))
    ]
    if wrong:
        raise ConfigError(wrong)
    devices = np.asarray(devices, dtype=float)
    mtbf = device_mtbf_hours * 3600.0 / devices
    cost, restart = checkpoint_seconds, restart_seconds
    best = best_interval(mtbf, cost)
    interval = best if interval_seconds is None else np.full(mtbf.shape, interval_seconds)
    expected = expected_seconds(mtbf, interval, cost, restart)
    useful = interval / expected
    saving = cost / expected
    failed = np.expm1((interval + cost) / mtbf)  # attempts per interval that end in a failure
    restarting = failed * mtbf * np.expm1(restart / mtbf) / expected
    return Goodput(
        devices=devices,
        mtbf=mtbf,
        interval=interval,
        young=np.sqrt(2 * cost * mtbf),
        daly=daly_interval(mtbf, cost),
        goodput=useful,
        checkpointing=saving,
        lost_work=1.0 - useful - saving - restarting,
        restarting=restarting,
        failures_per_day=86400.0 / mtbf,
    )


def expected_seconds(mtbf: Array, interval: Array, cost: Array, restart: Array) -> Array:
    """Expected wall time of `interval` seconds of work and the checkpoint after it."""
    busy = np.expm1((interval + cost) / mtbf)
    return mtbf * np.exp(restart / mtbf) * busy


def best_interval(mtbf: Array, cost: Array) -> Array:
    """The exact optimum, by bisection: work is lost too often above it, saved too often below."""
    mtbf, cost = np.broadcast_arrays(np.asarray(mtbf, dtype=float), np.asarray(cost, dtype=float))
    low, high = np.zeros(mtbf.shape), mtbf.copy()
    for _ in range(80):
        middle = (low + high) / 2
        too_short = np.exp((middle + cost) / mtbf) * (1.0 - middle / mtbf) > 1.0
        low, high = np.where(too_short, middle, low), np.where(too_short, high, middle)
    return (low + high) / 2


def daly_interval(mtbf: Array, cost: Array) -> Array:
    """Daly's estimate: sqrt(2CM)·(1 + sqrt(C/2M)/3 + C/18M) - C, and M where C is over 2M."""
    ratio = cost / (2.0 * mtbf)
    estimate = np.sqrt(2.0 * cost * mtbf) * (1.0 + np.sqrt(ratio) / 3.0 + ratio / 9.0) - cost
    return np.where(ratio < 1.0, estimate, mtbf)


def checkpoint_seconds(held: float, link_gbps: float) -> float:
    """Seconds in which a device copies `held` bytes over its link to the host: training stands
    still for that long where checkpoints are written in the background."""
    return held / (link_gbps * 1e9)
