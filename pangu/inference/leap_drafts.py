"""Guesses of the model's leap heads (L-MTP, arXiv 2505.17505, section 3.3), read backward.

A head leaps over tokens that the heads saw from the positions before: the hidden states of the last
k positions together predict every one of the next k(n - 1) + 1, for n heads of stride k.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from weakref import WeakKeyDictionary

import torch

from pangu.inference.batching import Sequence, Work
from pangu.inference.forward import Forward
from pangu.inference.speculative import Draft, Drafter, guess, joined


def head_and_state(guess: int, stride: int) -> tuple[int, int]:
    """Who guesses the token `guess` (from 1) positions behind the last one, which the state before
    it has predicted: head ⌈guess / k⌉, from the state so many positions before that one.

    The state at t - o gives with head i the token t - o + k·i + 1; token t + 1 is the last one. The
    paper's offset (j - 1) mod k of the j-th token is this for strides of 1 and 2 alone.
    """
    head = -(-guess // stride)
    return head, stride * head - guess


class LeapDrafter(Drafter):
    """k(n - 1) guesses of a sequence, once the states of its last k positions are known: prefixes
    from the cache and preempted sequences have none for a few tokens."""

    independent = True

    def __init__(self, forward: Forward, vocab_size: int) -> None:
        self._forward, self._vocab_size = forward, vocab_size
        heads, self.stride = forward.leaps
        self.deepest = self.stride * (heads - 1)
        # The states of the last positions, and the position of the first of them.
        self._states: WeakKeyDictionary[Sequence, tuple[int, torch.Tensor]] = WeakKeyDictionary()

    def saw(self, works: SequenceOf[Work], hidden: SequenceOf[torch.Tensor]) -> None:
        for work, part in zip(works, hidden, strict=True):
            before = self._states.get(work.sequence)
            first, known = joined(before, work.sequence.computed, part)
            kept = max(0, len(known) - self.stride)
            self._states[work.sequence] = (first + kept, known[kept:])

    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, Draft]:
        states = {
            sequence: known[end - self.stride : end]
            for sequence in counts
            for first, known in [self._states[sequence]]
            if (end := sequence.computed - first) >= self.stride
        }
        found = {sequence: Draft() for sequence in states}
        longest = max((counts[sequence] for sequence in found), default=0)
        logits: dict[int, torch.Tensor] = {}  # of each head: [sequences, states, vocab]
        for number in range(1, min(longest, self.deepest) + 1):
            head, back = head_and_state(number, self.stride)
            if head not in logits:
                rows = self._forward.leap(head, torch.cat(list(states.values())))
                logits[head] = rows[:, : self._vocab_size].unflatten(0, (-1, self.stride))
            guess(found, logits[head][:, self.stride - 1 - back], self, self._forward)
        for sequence, draft in found.items():
            found[sequence] = draft.cut(counts[sequence])
        return found
