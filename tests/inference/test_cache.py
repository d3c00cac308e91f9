"""Pages: handed out side by side, shared, kept, evicted from the end."""

import pytest

from pangu.inference.cache import OutOfPages, PagePool, page_name


def names(*pages):
    found = [b""]
    for page in pages:
        found.append(page_name(found[-1], page))
    return found[1:]


def grow(pool, count, pages=None):
    pages = pages if pages is not None else []
    for _ in range(count):
        pages.append(pool.take(pages[-1] if pages else None))
    return pages


def test_sequences_that_grow_together_lie_side_by_side_each():
    pool = PagePool(64, 4)
    sequences = [[] for _ in range(4)]
    for _ in range(8):
        for pages in sequences:
            grow(pool, 1, pages)
    for pages in sequences:
        assert pages == list(range(pages[0], pages[0] + 8))


def test_no_page_is_given_twice_and_none_is_lost():
    pool = PagePool(10, 4)
    first, second = grow(pool, 5), grow(pool, 5)
    assert sorted(first + second) == list(range(10))
    with pytest.raises(OutOfPages):
        pool.take(None)
    pool.release(first)
    assert pool.available == 5
    assert sorted(grow(pool, 5)) == sorted(first)


def test_pages_are_evicted_from_the_end_of_the_sequence_unused_for_longest(monkeypatch):
    monkeypatch.setattr("pangu.inference.cache._EVICTED_AT_ONCE", 1)
    pool = PagePool(6, 2)
    old, new = names((1, 2), (3, 4), (5, 6)), names((7, 8), (9, 1))
    for found in (old, new):
        pages = grow(pool, len(found))
        for page, name in zip(pages, found, strict=True):
            pool.name(page, name)
        pool.release(pages)
    grow(pool, 1)  # the free one
    grow(pool, 1)
    assert pool.share(old[2]) is None
    assert pool.share(old[0]) is not None
    grow(pool, 1)
    assert pool.share(old[1]) is None
    assert pool.available == 2
    grow(pool, 2)
    assert [pool.share(name) for name in new] == [None, None]
    with pytest.raises(OutOfPages):  # the page in use stays
        pool.take(None)
    assert pool.share(old[0]) is not None


def test_the_same_tokens_behind_others_are_another_page():
    assert names((1, 2), (3, 4))[1] != names((2, 2), (3, 4))[1]


def test_what_was_forgotten_is_not_found():
    pool = PagePool(4, 2)
    (name,) = names((1, 2))
    (page,) = grow(pool, 1)
    pool.name(page, name)
    pool.release([page])
    assert pool.share(name) == page
    pool.forget()
    assert pool.share(name) is None
    pool.release([page])
    assert pool.available == 4
