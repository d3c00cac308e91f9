"""Drafts that branch: several guesses for one place, verified in one pass with tree attention
(SpecInfer, arXiv 2305.09781; Medusa, arXiv 2401.10774).

A tree's nodes stand in an order in which every node comes after its parent; parent -1 is the text's
last token. `ranks` count the candidates for a place from the likeliest, 0.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

import torch

WIDTH = 4  # candidates for a place


def depths(parents: Sequence[int]) -> list[int]:
    """How far behind the text's last token each node stands, from 1."""
    found: list[int] = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 1)
    return found


def seen(parents: Sequence[int]) -> torch.Tensor:
    """Which nodes a node attends to: its ancestors and itself, bool `[nodes, nodes]`."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


class Accuracies:
    """How often the candidate of a rank was right at a depth, all before it having been.

    Before anything is known a place's likeliest candidate is taken to be right three times in five
    and each next one a third as often.
    """

    def __init__(self) -> None:
        self._right: defaultdict[tuple[int, int], int] = defaultdict(int)
        self._asked: defaultdict[int, int] = defaultdict(int)

    def of(self, depth: int, rank: int) -> float:
        guessed = 0.6 / 3**rank
        return (self._right[depth, rank] + 4 * guessed) / (self._asked[depth] + 4)

    def saw(
        self, candidates: Sequence[Sequence[int]], tokens: Sequence[int], independent: bool
    ) -> None:
        """What came, beside the candidates for each place; where they are not `independent`, they
        say nothing once another token than the likeliest has come."""
        for depth, (place, token) in enumerate(zip(candidates, tokens, strict=False), start=1):
            self._asked[depth] += 1
            if token in place:
                self._right[depth, place.index(token)] += 1
            if not independent and token != place[0]:
                return

    def _order(self, depth: int) -> list[int]:
        """Ranks, the one that is right most often first."""
        return sorted(range(WIDTH), key=lambda rank: -self.of(depth, rank))

    def expected(self, nodes: int, deepest: int, independent: bool) -> float:
        """Tokens that a tree of so many brings: the model's own, and each node as often as all
        are right that lead to it."""
        chances: list[float] = []
        for depth, rank, parent in self.tree(nodes, deepest, independent):
            chances.append((chances[parent] if parent >= 0 else 1.0) * self.of(depth, rank))
        return 1.0 + sum(chances)

    def tree(self, nodes: int, deepest: int, independent: bool) -> list[tuple[int, int, int]]:
        """The most probable `nodes` paths of candidates, greedily: depth, rank and parent of each
        node. Where candidates are not `independent` of those before them, only the likeliest of
        a place has others behind it."""
        found: list[tuple[int, int, int]] = []
        waiting: list[tuple[float, int, int, int, float]] = []

        def offer(depth: int, place: int, parent: int, before: float) -> None:
            """A node's `place`-th best candidate, behind a path of probability `before`."""
            if depth <= deepest and place < WIDTH:
                rank = self._order(depth)[place]
                chance = before * self.of(depth, rank)
                heapq.heappush(waiting, (-chance, depth, place, parent, before))

        offer(1, 0, -1, 1.0)
        while waiting and len(found) < nodes:
            chance, depth, place, parent, before = heapq.heappop(waiting)
            rank = self._order(depth)[place]
            found.append((depth, rank, parent))
            offer(depth, place + 1, parent, before)
            if independent or rank == 0:
                offer(depth + 1, 0, len(found) - 1, -chance)
        return found


def grown(
    shape: Sequence[tuple[int, int, int]], candidates: Sequence[Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Tokens and parents of the nodes of `shape` for which there are candidates."""
    tokens: list[int] = []
    parents: list[int] = []
    place: dict[int, int] = {-1: -1}
    for number, (depth, rank, parent) in enumerate(shape):
        there = depth <= len(candidates) and rank < len(candidates[depth - 1])
        if there and parent in place:
            place[number] = len(tokens)
            tokens.append(candidates[depth - 1][rank])
            parents.append(place[parent])
    return tokens, parents
