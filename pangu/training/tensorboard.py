"""TensorBoard's event file, written in this thread.

tensorboard's own writer has a thread that dies, with a traceback, on the first full disk.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from pangu.training.growing_file import GrowingFile


class Board:
    """The numbers of a run's rows, by step; a full disk delays them."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Events of `first_step` and later in the folder's other files are no longer shown."""
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._folder = folder
        self._file = GrowingFile(folder / name, "TensorBoard's events")
        start = SessionLog(status=SessionLog.START)
        self._write(
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, step=first_step, session_log=start),
        )

    def write(self, row: dict[str, Any]) -> None:
        """Every number of a row."""
        now = time.time()
        self._write(
            *(
                Event(wall_time=now, step=row["step"], summary=scalar(name, value))
                for name, value in row.items()
                if name != "step" and isinstance(value, int | float)
            )
        )

    def close(self) -> None:
        """What has waited for room has its last chance."""
        self._write()

    def _write(self, *events: Event) -> None:
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        with contextlib.suppress(OSError):  # the file's own failure is said
            self._folder.mkdir(parents=True, exist_ok=True)
        self._file.append(records.getvalue())
