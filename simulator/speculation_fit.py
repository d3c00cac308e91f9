"""MoESD's fitted model (arXiv 2505.19645, section 3.3): ten parameters from a few measured points.

With G(t) = s^t up to the ridge λ·RP and its tangent beyond, N(t) the experts that t tokens wake:

    T_T(t) = bias + k1·G(t) + k2·N(t) + k3·G(t·K/N(t))      T_D(B) = draft_bias + draft_k·G(B)
    T_reject(B) = reject_bias + reject_k·B

and the speed-up of `simulator.speculation`. It is the equation that is fitted: the printed
Algorithm 1 counts the target twice and the draft once. Whether a pass that verifies γ drafted
tokens has γ for each sequence, as in the paper, or γ + 1 is what fits better. Speed-ups do not
change when all times grow alike: `bias` is 1.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.violation import ConfigError, Violation
from simulator.array import Array
from simulator.moesd import active_experts

COLUMNS = ("batch", "draft_tokens", "top_k", "sigma", "speedup")
FEWEST = 10  # points for ten parameters, one of which is the unit of time
ROUNDS = 100
# Search limits: logarithms of the coefficients and of s - 1, and λ (appendix C.2).
_LOW = np.array([-14.0] * 7 + [0.2, -12.0])
_HIGH = np.array([10.0] * 7 + [1.0, 0.0])


class Points(NamedTuple):
    """Measured points, one array each; `used` are those that the model is fitted to."""

    batch: np.ndarray
    draft_tokens: np.ndarray
    top_k: np.ndarray
    sigma: np.ndarray
    speedup: np.ndarray
    used: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """The model with its parameters; times in units of `bias`. `ridge` is RP, peak FLOPS over the
    memory's bytes per second."""

    experts: int
    ridge: float
    bias: float
    k1: float
    k2: float
    k3: float
    draft_bias: float
    draft_k: float
    reject_bias: float
    reject_k: float
    ridge_part: float  # λ
    growth: float  # s
    beside: int  # tokens that a pass verifies beside the drafted ones, 0 or 1

    def speedup(self, batch: Array, draft_tokens: Array, top_k: Array, sigma: Array) -> Array:
        """Of `batch` sequences with `draft_tokens` each, of which the part `sigma` comes out."""
        plain = self._target(np.asarray(batch, dtype=float), top_k)
        verify = self._target(np.asarray(batch) * (draft_tokens + self.beside), top_k)
        draft = self.draft_bias + self.draft_k * self._roofline(batch)
        rejection = self.reject_bias + self.reject_k * np.asarray(batch)
        return sigma * (draft_tokens + 1.0) * plain / (draft_tokens * draft + verify + rejection)

    def _target(self, tokens: Array, top_k: Array) -> Array:
        """Seconds of one pass of the model."""
        active = active_experts(tokens, self.experts, top_k)
        load = np.asarray(tokens) * top_k / active
        return (
            self.bias
            + self.k1 * self._roofline(tokens)
            + self.k2 * active
            + self.k3 * self._roofline(load)
        )

    def _roofline(self, tokens: Array) -> Array:
        """G(t): slow, then faster, then a straight line (equation 11)."""
        tokens = np.asarray(tokens, dtype=float)
        turn, rate = self.ridge_part * self.ridge, np.log(self.growth)
        below = np.exp(rate * np.minimum(tokens, turn))
        return below * (1.0 + rate * np.maximum(tokens - turn, 0.0))


@dataclass(frozen=True)
class Fit:
    """A fitted model and how far it is from the points: mean squared error of the speed-up at
    those it was fitted to and at the others (None: there are none), and the mean and largest
    relative error at the others, or at all where there are none."""

    model: Fitted
    used: int
    points: int
    mse_used: float
    mse_others: float | None
    mean_error: float
    max_error: float


def fit(points: Points, experts: int, ridge: float) -> Fit:
    """The parameters of least squares at the points `used`, by Levenberg and Marquardt's method
    from several starts, inside the search limits."""
    chosen = points.used
    one = Points(*(column[chosen] for column in points))
    model, least = None, np.inf
    for part, growth, beside in product((0.4, 0.8), (-5.0, -3.0), (1, 0)):
        start = np.array([-1.0, -3.0, -1.0, -2.0, -4.0, -3.0, -6.0, part, growth])
        theta, cost = _least_squares(partial(_errors_at, one, experts, ridge, beside), start)
        if cost < least:
            model, least = _model(theta, experts, ridge, beside), cost
    assert model is not None
    errors = _errors(model, points)
    others = ~chosen
    judged = np.abs(errors / points.speedup)[others if others.any() else chosen]
    return Fit(
        model=model,
        used=int(chosen.sum()),
        points=len(errors),
        mse_used=float(np.mean(errors[chosen] ** 2)),
        mse_others=float(np.mean(errors[others] ** 2)) if others.any() else None,
        mean_error=float(judged.mean()),
        max_error=float(judged.max()),
    )


def _model(theta: np.ndarray, experts: int, ridge: float, beside: int) -> Fitted:
    coefficients = [float(value) for value in np.exp(theta[:7])]
    growth = float(1.0 + np.exp(theta[8]))
    last = {"ridge_part": float(theta[7]), "growth": growth, "beside": beside}
    return Fitted(experts, ridge, 1.0, *coefficients, **last)  # type: ignore[arg-type]


def _errors_at(
    points: Points, experts: int, ridge: float, beside: int, theta: np.ndarray
) -> np.ndarray:
    return _errors(_model(theta, experts, ridge, beside), points)


def _errors(model: Fitted, points: Points) -> np.ndarray:
    speedup = model.speedup(points.batch, points.draft_tokens, points.top_k, points.sigma)
    return np.asarray(speedup) - points.speedup


def _least_squares(
    residual: Callable[[np.ndarray], np.ndarray], theta: np.ndarray
) -> tuple[np.ndarray, float]:
    """Levenberg and Marquardt: steps between Gauss-Newton's and the gradient's, clipped to the
    limits; and the sum of squares that they end at."""
    damping, now = 1e-2, residual(theta)
    cost = float(now @ now)
    for _ in range(ROUNDS):
        steps = 1e-6 * np.maximum(np.abs(theta), 1.0)
        slopes = np.stack(
            [(residual(theta + move) - now) / move.sum() for move in np.diag(steps)], axis=1
        )
        gradient, curvature = slopes.T @ now, slopes.T @ slopes
        while damping < 1e12:
            scale = np.diag(np.maximum(np.diag(curvature), 1e-9)) * damping
            trial = np.clip(theta - np.linalg.solve(curvature + scale, gradient), _LOW, _HIGH)
            after = residual(trial)
            if (squares := float(after @ after)) < cost:
                break
            damping *= 4.0
        else:
            break
        gained = cost - squares
        theta, now, cost, damping = trial, after, squares, damping / 3.0
        if gained < 1e-9 * cost or cost < 1e-14:
            break
    return theta, cost


def read_points(path: Path, experts: int, wanted: int) -> Points:
    """Measured points from a CSV file with the columns `COLUMNS`, and perhaps `fit`, 1 for those
    to fit to. Without it about `wanted` are taken evenly from the points in the order of top_k,
    draft length and batch, as the paper does: batches left out are what spoils a fit.

    Raises:
        ConfigError: the file cannot be read, lacks a column, or holds what cannot be fitted.
    """

    def wrong(reason: str) -> ConfigError:
        return ConfigError([Violation("--fit", path, reason)])

    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise wrong("is no CSV file") from None
    if missing := [name for name in COLUMNS if not rows or name not in rows[0]]:
        raise wrong(f"lacks the column {missing[0]}: it has a head of {','.join(COLUMNS)}")
    try:
        table = np.array([[float(row[name]) for name in COLUMNS] for row in rows])
        marks = np.array([float(row.get("fit") or 0) for row in rows])
    except (TypeError, ValueError):
        raise wrong("holds something that is no number") from None
    if not np.isfinite(table).all() or table.min() <= 0 or table[:, 3].max() > 1:
        raise wrong("must hold numbers above 0, sigma of at most 1")
    if table[:, 2].max() > experts:
        raise wrong(f"has top_k={table[:, 2].max():g}, the model {experts} experts")
    order = np.lexsort((table[:, 0], table[:, 1], table[:, 2]))
    table, marks = table[order], marks[order]
    used = marks == 1
    if "fit" not in rows[0]:
        used[:: max(1, -(-len(table) // wanted))] = True
    if used.sum() < FEWEST:
        raise wrong(f"gives {used.sum()} points to fit to, ten parameters need {FEWEST}")
    batch, length, top_k, sigma, speedup = table.T
    return Points(batch, length, top_k, sigma, speedup, used)
