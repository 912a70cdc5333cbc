"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..stats import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server; several may live in one process.

    stats: gives the totals of each model. gauges: name -> (what it is, what gives its value now). jobs: gives their
    number by state.
    """

    def __init__(
        self,
        *,
        stats: Callable[[], Mapping[str, Stats]],
        gauges: Mapping[str, tuple[str, Callable[[], float]]],
        jobs: Callable[[], Mapping[str, int]],
    ):
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        labels = ["route", "method", "status"]
        self._requests = Counter("sr_http_requests", "Requests answered.", labels, registry=self._registry)
        self._seconds = Histogram(
            "sr_http_request_seconds", "From a request's head to the end of its answer.", ["route"],
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Read(stats, gauges, jobs))

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """Take note of an answer."""
        known = method if method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS") else "other"
        self._requests.labels(route, known, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Write all of them as Prometheus reads them."""
        return generate_latest(self._registry)


class _Read(Collector):
    """What is read where it stands when it is asked for."""

    def __init__(
        self,
        stats: Callable[[], Mapping[str, Stats]],
        gauges: Mapping[str, tuple[str, Callable[[], float]]],
        jobs: Callable[[], Mapping[str, int]],
    ):
        self._stats, self._gauges, self._jobs = stats, gauges, jobs

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        totals = self._stats()
        for item in fields(Stats):
            name = f"{item.name.removesuffix('_s')}_seconds" if item.name.endswith("_s") else item.name
            family = CounterMetricFamily(f"sr_{name}", f"Upscaler.stats.{item.name}.", labels=["model"])
            for model, stats in totals.items():
                family.add_metric([model], getattr(stats, item.name))
            yield family
        for name, (what, value) in self._gauges.items():
            yield GaugeMetricFamily(name, what, value())
        jobs = GaugeMetricFamily("sr_jobs", "Jobs that are kept.", labels=["state"])
        for state, count in self._jobs().items():
            jobs.add_metric([state], count)
        yield jobs
