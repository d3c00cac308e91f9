"""What tokens of a pass see, against attention over each sequence's own text."""

import pytest
import torch

from pangu import backends
from pangu.inference.cache import KeyValues
from pangu.inference.cached_pass import CachedPass, Segment
from pangu.ops.attention import attention_reference

backends.select("cpu")
PAGE = 4
# (start, count): single tokens of about equal and of other lengths, a few tokens, a prompt's end, a
# whole prompt, and texts too long to be copied.
SEGMENTS = [(9, 1), (11, 1), (40, 1), (5, 3), (70, 30), (0, 20), (300, 1), (299, 5)]


def texts(seed=0):
    """query, key and value of each sequence, `[length, 1, heads, size]`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(start + count, 1, heads, 8, generator=generator) for heads in (4, 2, 2)]
        for start, count in SEGMENTS
    ]


def attended(numbers, pages, of=texts):
    """The outputs of a pass over these sequences, each with its pages, behind what is cached."""
    store, found = KeyValues(4 * sum(map(len, pages))), of()
    store.of(1, *(found[0][1:]))
    for each in store.layers[1]:
        each.fill_(torch.nan)  # of others, or never written
    for number, own in zip(numbers, pages, strict=True):
        start, _ = SEGMENTS[number]
        if start:  # a pass of its own
            before = [part[:start] for part in found[number]]
            CachedPass(store, PAGE, [Segment(0, start, own)], []).attend(1, *before, 0.3)
    segments = [Segment(*SEGMENTS[n], own) for n, own in zip(numbers, pages, strict=True)]
    rows = [[part[SEGMENTS[n][0] :] for part in found[n]] for n in numbers]
    made = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    out = CachedPass(store, PAGE, segments, []).attend(1, *made, 0.3)
    return out.split([SEGMENTS[n][1] for n in numbers])


def pages_of(numbers, scattered):
    needed = [-(-sum(SEGMENTS[n]) // PAGE) for n in numbers]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)).tolist()
    places = iter(order if scattered else range(sum(needed)))
    return [[next(places) for _ in range(count)] for count in needed]


@pytest.mark.parametrize("scattered", [False, True])
def test_each_sequence_attends_to_its_own_text_alone(scattered):
    numbers = range(len(SEGMENTS))
    found = attended(numbers, pages_of(numbers, scattered))
    for number, text in enumerate(texts()):
        start, _ = SEGMENTS[number]
        expected = attention_reference(text[0][start:], *text[1:], scale=0.3)
        torch.testing.assert_close(found[number], expected, rtol=1e-5, atol=1e-5)


def test_its_numbers_are_the_same_bit_for_bit_whoever_else_is_there():
    numbers = [3, 1, 6, 0, 4, 2]
    among = attended(numbers, pages_of(numbers, scattered=True))
    for number, found in zip(numbers, among, strict=True):
        (alone,) = attended([number], pages_of([number], scattered=False))
        assert torch.equal(alone, found)


def test_what_fills_a_pass_up_attends_to_nothing():
    query, key, value = (part[:10] for part in texts()[0])
    segment = Segment(9, 1, [0, 1, 2])
    out = CachedPass(KeyValues(12), PAGE, [segment], []).attend(1, query, key, value, 0.3)
    assert out.shape == (10, 1, 4, 8)
    assert out[1:].count_nonzero() == 0
    assert out[0].count_nonzero() > 0
