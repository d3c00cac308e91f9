"""A run's rows and configuration for MLflow: a run there, told from a thread of rank 0.

Training never waits for a server, and does not end with it.
"""

from __future__ import annotations

import math
import os
import sys
import time
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

# Whatever the user has set counts. By default a server that is gone is asked again for minutes,
# and MLflow itself tells its makers how it is used.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

# What a server takes in one request: 100 parameters and 1,000 metrics.
PARAMETERS, ROWS = 100, 30
CLOSE_SECONDS = 60.0  # for what is still to be told at the end of a run


class MlflowRun:
    """A run of an experiment; rows with the same step (a run that went back) are all kept there."""

    def __init__(self, uri: str, *, experiment: str, name: str, parameters: dict[str, Any]) -> None:
        """Raises:
        Exception: whatever MLflow and its transport raise where the server cannot be used.
        """
        self._client = MlflowClient(uri)
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        self.id: str = self._client.create_run(number, run_name=name).info.run_id
        given = [Param(key, str(value)) for key, value in parameters.items()]
        for first in range(0, len(given), PARAMETERS):
            self._client.log_batch(self.id, params=given[first : first + PARAMETERS])
        self._rows: SimpleQueue[list[Metric] | None] = SimpleQueue()
        self._failed = False
        self._thread = Thread(target=self._tell, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, row: dict[str, Any]) -> None:
        """Every finite number of a row, soon."""
        now = round(time.time() * 1000)
        numbers = {
            name: value
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._rows.put([Metric(name, value, now, row["step"]) for name, value in numbers.items()])

    def close(self) -> None:
        """What is waiting is told, the run there is over."""
        self._rows.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn("its server does not answer")

    def _tell(self) -> None:
        more = True
        while more:
            waiting = [self._rows.get()]
            try:
                while len(waiting) < ROWS:
                    waiting.append(self._rows.get_nowait())
            except Empty:
                pass
            more = None not in waiting
            metrics = [metric for row in waiting if row for metric in row]
            try:
                if metrics:
                    self._client.log_batch(self.id, metrics=metrics)
                if not more:
                    self._client.set_terminated(self.id)
            except Exception as error:  # of MLflow, of the network: none may end the run
                self._warn(first_line(error))

    def _warn(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            print(f"warning: watch.mlflow: rows were not told: {why}", file=sys.stderr)


def first_line(error: Exception) -> str:
    """What an exception says, in a line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
