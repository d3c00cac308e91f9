"""An assignment of many rows to few clusters of equal size, exact.

It is a transport problem: every cluster has `rows / clusters` equal places. Each row begins in its
cheapest cluster; what is too much there moves on, a row at a time, along cheapest paths from
cluster to cluster (successive shortest paths), after each of which the assignment is the cheapest
of its sizes. The graph has a node a cluster, whatever the number of rows.

Shapes: R rows, C clusters.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

_NEVER = np.iinfo(np.int64).max // 4


def balanced_assignment(costs_RC: np.ndarray) -> np.ndarray:
    """The cluster of every row, int64 `[R]`, R/C rows in each, of least summed cost. `costs_RC` are
    integers, so that equal sums are equal.

    Raises:
        ValueError: the rows do not fall into clusters of equal size.
    """
    rows, clusters = costs_RC.shape
    if rows % clusters:
        raise ValueError(f"{rows} rows do not fall into {clusters} clusters of equal size")
    costs_RC = costs_RC.astype(np.int64)
    cluster_R = costs_RC.argmin(axis=1)
    surplus_C = np.bincount(cluster_R, minlength=clusters) - rows // clusters
    extra_CC, mover_CC = _all_moves(costs_RC, cluster_R, clusters)
    while surplus_C.any():
        path = _cheapest_path(extra_CC, surplus_C)
        moves = [(mover_CC[a, b], b) for a, b in pairwise(path)]
        for row, target in moves:
            cluster_R[row] = target
        surplus_C[path[0]] -= 1
        surplus_C[path[-1]] += 1
        for node in path:
            extra_CC[node], mover_CC[node] = _moves(costs_RC, cluster_R, node)
    return cluster_R


def _all_moves(
    costs_RC: np.ndarray, cluster_R: np.ndarray, clusters: int
) -> tuple[np.ndarray, np.ndarray]:
    found = [_moves(costs_RC, cluster_R, node) for node in range(clusters)]
    return np.stack([extra for extra, _ in found]), np.stack([row for _, row in found])


def _moves(costs_RC: np.ndarray, cluster_R: np.ndarray, node: int) -> tuple[np.ndarray, np.ndarray]:
    """Of cluster `node`: what it costs at least to give a row to each cluster, and which row."""
    members = np.flatnonzero(cluster_R == node)
    if not len(members):
        return np.full(costs_RC.shape[1], _NEVER), np.zeros(costs_RC.shape[1], np.int64)
    extra_MC = costs_RC[members] - costs_RC[members, node][:, None]
    best_C = extra_MC.argmin(axis=0)
    extra_C = extra_MC[best_C, np.arange(len(best_C))]
    extra_C[node] = _NEVER  # no way leads to where it begins
    return extra_C, members[best_C]


def _cheapest_path(extra_CC: np.ndarray, surplus_C: np.ndarray) -> list[int]:
    """From any cluster with too many rows to any with too few (Bellman and Ford: a row that goes
    on from where it was moved may save something)."""
    distance_C = np.where(surplus_C > 0, 0, _NEVER)
    before_C = np.full(len(surplus_C), -1)
    for _ in range(len(surplus_C)):
        through_CC = np.minimum(distance_C[:, None] + extra_CC, _NEVER)
        best_C = through_CC.argmin(axis=0)
        shorter_C = through_CC[best_C, np.arange(len(best_C))]
        closer = shorter_C < distance_C
        if not closer.any():
            break
        distance_C = np.where(closer, shorter_C, distance_C)
        before_C = np.where(closer, best_C, before_C)
    path = [int(np.where(surplus_C < 0, distance_C, _NEVER).argmin())]
    while before_C[path[0]] >= 0:
        path.insert(0, int(before_C[path[0]]))
    return path
