"""A file that a run appends to for as long as it lives, whatever becomes of the disk."""

from __future__ import annotations

import sys
from pathlib import Path


class GrowingFile:
    """What cannot be written now waits in memory and is written, in order, with what follows.

    A write that a full disk cut short goes on where it stopped.
    """

    def __init__(self, path: Path, holds: str) -> None:
        """`holds` is what the file holds, in a warning's words."""
        self.path = path
        self.holds = holds
        self.waiting = b""

    def append(self, data: bytes) -> None:
        """Write `data`; it is in the file when the call returns, or waits."""
        waited = bool(self.waiting)
        self.waiting += data
        if not self.waiting:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]
        except OSError as error:
            if not waited:
                print(f"warning: {self.holds} wait to be written: {error}", file=sys.stderr)
            return
        if waited:
            print(f"{self.holds} are written again, what had waited too", file=sys.stderr)
