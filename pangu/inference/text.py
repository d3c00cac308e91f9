"""The text of a growing sequence, cut where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence

from pangu.data.tokenizer import StreamDecoder, Tokenizer


class StoppedText:
    """Pieces of text that join to the whole; text that may be the beginning of a stop string is
    held back until it is known whether it is. `ended`: a stop string was found."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.ended = False

    def push(self, token: int) -> str:
        """Text that is certain once `token` is known."""
        return self._certain(self._decoder.push(token))

    def flush(self) -> str:
        """What is left at the end."""
        piece = self._certain(self._decoder.flush())
        piece, self._held = piece + self._held, ""
        return piece

    def _certain(self, piece: str) -> str:
        text = self._held + piece
        if self.ended:
            return ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)]
        longest = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` a stop string may begin with."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
