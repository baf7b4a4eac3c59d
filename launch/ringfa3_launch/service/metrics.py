"""What Prometheus reads: requests, tokens and times as they happen, and the gang's state at the time of the scrape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from ringfa3_launch.service.contract import RankHealth

FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
WHOLE = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
HOP = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One app's own registry, so that several apps fit into a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        new: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("ringfa3_requests", "Answers, by route and status.", ("route", "status"), **new)
        self.seconds = Histogram("ringfa3_request_seconds", "Whole requests.", ("route",), buckets=WHOLE, **new)
        self.inside = Gauge("ringfa3_requests_in_flight", "Requests that work is done for.", ("kind",), **new)
        self.prompt = Counter("ringfa3_prompt_tokens", "Tokens of prompts.", **new)
        self.cached = Counter("ringfa3_cached_tokens", "Tokens of prompts that the cache already held.", **new)
        self.completion = Counter("ringfa3_completion_tokens", "Tokens generated.", **new)
        self.finished = Counter("ringfa3_completions", "Completions, by how they ended.", ("finish",), **new)
        self.first = Histogram("ringfa3_time_to_first_token_seconds", "Request to first token.", buckets=FIRST, **new)
        self.token = Histogram(
            "ringfa3_time_per_output_token_seconds", "Mean of a completion, first token to last.", buckets=TOKEN, **new
        )
        self.hop = Histogram(
            "ringfa3_hop_seconds",
            "Hops of prefills, all ranks, of those prefills that were the last at a scrape.",
            buckets=HOP,
            **new,
        )
        self.attention = Histogram("ringfa3_attention_seconds", "Attention calls.", ("kind",), buckets=WHOLE, **new)
        self._prefill: Any = None  # number of the last one whose hops were counted
        self.gang = _Gang()
        self.registry.register(self.gang)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def prefilled(self, prefill: Mapping[str, Any] | None) -> None:
        """Count the hops of the last prefill that the gang tells of, once."""
        if prefill and prefill["number"] != self._prefill:
            self._prefill = prefill["number"]
            for rank in prefill["ranks"]:
                for hop in rank["hops"]:
                    self.hop.observe(hop["stop_s"] - hop["start_s"])

    def text(self, health: Sequence[RankHealth], restarts: int, stats: Mapping[str, Any]) -> bytes:
        """The exposition, with the gang's state as given."""
        self.gang.state = (health, restarts, stats)
        return generate_latest(self.registry)


class _Gang:
    """The gang's state as metrics. Asking for it may block, so the route asks and leaves it here."""

    state: tuple[Sequence[RankHealth], int, Mapping[str, Any]] = ((), 0, {})

    def collect(self) -> Iterator[Metric]:
        health, restarts, stats = self.state
        for name, text in (("running", "Completions being computed."), ("waiting", "Completions in the queue.")):
            if name in stats:
                yield GaugeMetricFamily(f"ringfa3_completions_{name}", text, value=float(stats[name]))
        yield GaugeMetricFamily("ringfa3_gang_restarts", "Times that the gang was rebuilt.", value=float(restarts))
        families = {
            "up": GaugeMetricFamily("ringfa3_rank_up", "1: the rank lives.", labels=("rank", "host")),
            "used": GaugeMetricFamily("ringfa3_rank_cache_pages_used", "Pages in use.", labels=("rank", "host")),
            "pages": GaugeMetricFamily("ringfa3_rank_cache_pages", "Pages in all.", labels=("rank", "host")),
            "age": GaugeMetricFamily(
                "ringfa3_rank_last_collective_age_seconds", "Since its last collective.", labels=("rank", "host")
            ),
        }
        for rank in health:
            labels = (str(rank.rank), rank.host)
            families["up"].add_metric(labels, float(rank.alive))
            families["used"].add_metric(labels, float(rank.cache_used))
            families["pages"].add_metric(labels, float(rank.cache_pages))
            if rank.last_collective_age_s is not None:
                families["age"].add_metric(labels, rank.last_collective_age_s)
        yield from families.values()
