"""What Prometheus asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from pangu.inference.engine import Engine, Update
from pangu.serving.replicas import Replicas, State

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of a server, and the engine's own state at the time of asking; `bytes_read` tells
    those of a checkpoint that is read in parts."""

    def __init__(
        self, engine: Engine | Replicas, bytes_read: Callable[[], int] | None = None
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineState(engine, bytes_read))
        registry = self._registry
        self.requests = Counter("pangu_requests", "Ended requests", ["finish"], registry=registry)
        self.prompt_tokens = Counter("pangu_prompt_tokens", "Tokens of prompts", registry=registry)
        self.reused_tokens = Counter(
            "pangu_prompt_tokens_reused", "Of them, found in the cache", registry=registry
        )
        self.first_token = Histogram(
            "pangu_seconds_to_first_token", "From a request", buckets=_SECONDS, registry=registry
        )
        self.per_token = Histogram(
            "pangu_seconds_per_token", "After the first", buckets=_SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self._registry)


class Times:
    """When a request's tokens came, for the histograms."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start, self._last = time.perf_counter(), 0.0

    def saw(self, update: Update) -> None:
        now, count = time.perf_counter(), len(update.tokens)
        if not count:
            return
        if self._last:
            for _ in range(count):
                self._metrics.per_token.observe((now - self._last) / count)
        else:
            self._metrics.first_token.observe(now - self._start)
        self._last = now


class _EngineState(Collector):
    """Read without a lock: each figure is one number that the decoding thread replaces."""

    def __init__(self, engine: Engine | Replicas, bytes_read: Callable[[], int] | None) -> None:
        self._engine, self._bytes_read = engine, bytes_read

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        engine = self._engine
        found = engine.state if isinstance(engine, Replicas) else State.of(engine)
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("pangu_running", "Sequences in the batch", found.running)
        yield gauge("pangu_waiting", "Sequences that wait", found.waiting)
        yield gauge("pangu_cache_used", "Part of the cache in use", found.used / found.pages)
        yield counter("pangu_passes", "Passes of the model", value=found.passes)
        yield counter("pangu_generated_tokens", "Tokens drawn", value=found.tokens)
        yield counter("pangu_preemptions", "Sequences set back", value=found.preemptions)
        if self._bytes_read:
            read = self._bytes_read()
            yield counter("pangu_checkpoint_bytes_read", "Since the start", value=read)
        yield from self._speculation()
        for name, places in (("guessed", found.guessed), ("held", found.held)):
            family = counter(f"pangu_{name}_tokens", "Guesses by place", labels=["place"])
            for place, count in sorted(dict(places).items()):
                family.add_metric([str(place + 1)], count)
            yield family

    def _speculation(self) -> Iterator[GaugeMetricFamily]:
        """What rounds of the same size have brought, once drafts were made (arXiv 2505.19645); of
        replicas, those of the first."""
        engine = self._engine.engine if isinstance(self._engine, Replicas) else self._engine
        if engine.drafter is None:
            return
        rows = engine.counts.measured.report()["rounds"]
        told = {
            "sigma": "Tokens of a round, over the most that it could bring",
            "target_efficiency": "Time of a pass without guesses, over that of one with them",
        }
        for key, text in told.items():
            gauge = GaugeMetricFamily(f"pangu_{key}", text, labels=["sequences", "guesses"])
            for row in rows:
                if row["guesses"] and row[key] is not None:
                    gauge.add_metric([str(row["sequences"]), str(row["guesses"])], row[key])
            yield gauge
