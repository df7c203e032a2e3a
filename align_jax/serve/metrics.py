"""Counters of one server, in Prometheus' text format."""

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Metrics:
    """Counters with a registry of their own, so that a process can have several servers."""

    def __init__(self) -> None:
        """Starts all at 0, and counts compilations from now on."""
        self._registry = CollectorRegistry()
        own = {"registry": self._registry}
        self.requests = Counter("align_requests", "answers", ["route", "code"], **own)
        self.request_seconds = Histogram(
            "align_request_seconds", "from header to answer", ["route"], **own
        )
        self.batch_size = Histogram(
            "align_batch_size", "inputs a device call", ["tower"], buckets=_BATCH_BUCKETS, **own
        )
        self.queue_items = Gauge("align_queue_items", "inputs between arrival and answer", **own)
        self.stage_seconds = Histogram(
            "align_stage_seconds", "decode, wait, device or search", ["stage"], **own
        )
        self.rejected = Counter("align_rejected", "refused requests", ["reason"], **own)
        self.compiled = Counter(
            "align_compile", "programs compiled or read from the cache; constant once ready", **own
        )
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def text(self) -> bytes:
        """Returns all of them."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Counts compilations no longer."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration: float, **tags: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.compiled.inc()
