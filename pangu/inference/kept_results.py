"""Results of an evaluation on the disk, as they come: what was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

# A result by its number: the one that is kept, or what the function computes.
Remember = Callable[[int, Callable[[], list[float]]], list[float]]
_HEAD = '"results of pangu.evaluate"\n'


class OtherResults(Exception):
    """A file that is not one of results, or takes no more of them; the message is a reason."""


def anew(number: int, compute: Callable[[], list[float]]) -> list[float]:
    """Nothing is kept."""
    return compute()


class KeptResults:
    """A line of JSON for each result in `path`: the part it belongs to, its number, its values.

    Raises:
        OtherResults: the file is something else; or, when a result comes, the disk is full.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[tuple[str, int], list[float]] = {}
        if not path.exists():
            path.write_text(_HEAD)
        first, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        if first != _HEAD:
            raise OtherResults("holds something else than results: name a new file")
        for line in lines:
            try:
                part, number, values = json.loads(line)
                self._found[part, number] = [float(value) for value in values]
            except (ValueError, TypeError):  # cut short by a stop
                continue
        if lines and not lines[-1].endswith("\n"):
            self._append("\n")

    def _append(self, text: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OtherResults(f"{error.strerror}: what is in it is kept, run again") from None

    def of(self, part: str) -> Remember:
        """Those of one model on one text or task."""

        def remember(number: int, compute: Callable[[], list[float]]) -> list[float]:
            key = (part, number)
            if key not in self._found:
                self._found[key] = compute()
                self._append(json.dumps([part, number, self._found[key]]) + "\n")
            return self._found[key]

        return remember
