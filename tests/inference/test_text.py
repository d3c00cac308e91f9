"""Text that ends before a stop string, wherever its tokens cut it."""

import pytest

from pangu.data.tokenizer import NumberTokenizer
from pangu.inference.text import StoppedText


class Letters(NumberTokenizer):
    """Ids are bytes of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def pieces(text, stop):
    stopped = StoppedText(Letters(256), stop)
    found = []
    for byte in text.encode():
        found.append(stopped.push(byte))
        if stopped.ended:
            break
    return [*found, stopped.flush()], stopped.ended


@pytest.mark.parametrize(
    ("text", "stop", "expected", "ended"),
    [
        ("hello", (), "hello", False),
        ("one STOP two", ("STOP",), "one ", True),
        ("one STO two", ("STOP",), "one STO two", False),
        ("aaab", ("aab",), "a", True),
        ("ends with ST", ("STOP",), "ends with ST", False),
        ("naïve →end", ("→",), "naïve ", True),
        ("two at once", ("o a", "wo"), "t", True),
        ("x", ("",), "x", False),
    ],
)
def test_nothing_of_a_stop_string_is_shown_and_nothing_else_is_lost(text, stop, expected, ended):
    found, has_ended = pieces(text, stop)
    assert "".join(found) == expected
    assert has_ended == ended


def test_text_is_shown_as_soon_as_no_stop_string_can_begin_with_it():
    found, _ = pieces("a SxT", ("SQ", "T!"))
    assert found == ["a", " ", "", "Sx", "", "T"]
