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

import numpy as np

from configs.violation import ConfigError, Violation
from simulator.array import Array

LEAST = 1e-3  # useful share below which there is nothing to plan


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
    *,
    write_seconds: float = 0.0,
) -> Goodput:
    """Useful share of wall time, with the best checkpoint interval unless one is given.

    `checkpoint_seconds` is how long training stands still for one checkpoint (with asynchronous
    saving, only the copy to host memory), `write_seconds` how long it is then written beside
    training: until it is, a failure falls back to the one before, so that on average as much more
    work is done again, and the next one waits for it.

    Raises:
        ConfigError: with every time or number that cannot be, or leaves no time for work.
    """
    _refuse_impossible(
        write_seconds,
        devices=devices,
        device_mtbf_hours=device_mtbf_hours,
        checkpoint_seconds=checkpoint_seconds,
        restart_seconds=restart_seconds,
        interval_seconds=1.0 if interval_seconds is None else interval_seconds,
    )
    devices = np.asarray(devices, dtype=float)
    mtbf = device_mtbf_hours * 3600.0 / devices
    cost, restart = checkpoint_seconds, restart_seconds
    with np.errstate(over="ignore", invalid="ignore"):
        best = np.maximum(best_interval(mtbf, cost), write_seconds)
    interval = best if interval_seconds is None else np.full(mtbf.shape, interval_seconds)
    if np.any(interval < write_seconds):
        reason = f"a checkpoint takes {write_seconds:.3g} s to write, longer than this"
        raise ConfigError([Violation("interval_seconds", interval_seconds, reason)])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = expected_seconds(mtbf, interval, cost, restart + write_seconds)
        useful = interval / expected
        saving = cost / expected
        failed = np.expm1((interval + cost) / mtbf)  # attempts per interval that end in a failure
        restarting = failed * mtbf * np.expm1(restart / mtbf) / expected
    if not np.all(np.isfinite(expected) & (useful >= LEAST)):
        reason = f"devices then fail so often that less than {LEAST:.1%} of the time is useful:"
        reason += f" {mtbf.min():.3g} s between failures, {cost:.3g} s a checkpoint,"
        reason += f" {restart:.3g} s a restart"
        raise ConfigError([Violation("device_mtbf_hours", device_mtbf_hours, reason)])
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


def _refuse_impossible(write_seconds: float, **given: Array) -> None:
    wrong = [
        Violation(name, value, "must be a positive, finite number")
        for name, values in given.items()
        for value in np.ravel(values).tolist()
        if not (np.isfinite(value) and value > 0)
    ]
    if not np.isfinite(write_seconds) or write_seconds < 0:
        wrong.append(Violation("write_seconds", write_seconds, "must be finite and not negative"))
    if wrong:
        raise ConfigError(wrong)


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


def checkpoint_bytes(parameters: float, element: float) -> float:
    """Bytes of one checkpoint: every weight once, with float32 master weight and Adam's two
    moments."""
    return parameters * (element + 12.0)


def checkpoint_seconds(held: float, link_gbps: float) -> float:
    """Seconds in which a device copies `held` bytes over its link to the host: training stands
    still for that long where checkpoints are written in the background."""
    return held / (link_gbps * 1e9)
