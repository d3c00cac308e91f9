"""The newest row of a run for Prometheus, at `/metrics` of rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector


class Exporter(Collector):
    """Every number of the rows under `pangu_train_<key>`, until another row has the key, and what
    the device tells.

    `tokens` is a counter: those trained on since this process started.
    """

    def __init__(
        self, port: int, *, sensors: Callable[[], dict[str, float]] = dict, **labels: str
    ) -> None:
        """`sensors` are asked at every request (`Backend.sensors`).

        Raises:
            OSError: the port cannot be listened on.
        """
        self._labels, self._lock, self._sensors = labels, Lock(), sensors
        self._newest: dict[str, float] = {}
        self._tokens = 0.0
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(port, registry=registry)

    def write(self, row: dict[str, Any]) -> None:
        """What a row says; a value that there is none of in it (a skipped step's loss) is no longer
        told."""
        with self._lock:
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._newest[name] = value
                elif value is None:
                    self._newest.pop(name, None)
            self._tokens += self._newest.pop("tokens", 0.0)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        with self._lock:
            newest, tokens = dict(self._newest), self._tokens
        names, values = list(self._labels), list(self._labels.values())
        counter = CounterMetricFamily("pangu_train_tokens", "Trained since the start", labels=names)
        counter.add_metric(values, tokens)
        yield counter
        for name, value in (newest | self._sensors()).items():
            gauge = GaugeMetricFamily(f"pangu_train_{name}", "docs/metrics.md", labels=names)
            gauge.add_metric(values, value)
            yield gauge

    def close(self) -> None:
        """The port is free when this returns."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
