"""`/metrics`: what a server has done and is doing, in Prometheus' text format.

Counters and histograms are of `prometheus_client`, in a registry of one app; they may be written from any thread.
What the engine counts itself is read from it when somebody asks.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from starlette.types import Message, Send

from liaoyuan.inference import Event
from liaoyuan.serving.caller import CALLER
from liaoyuan.serving.llama_metrics import LlamaMetrics, Spent

OTHER = "other"  # paths that are no endpoint: a client must not be able to make ever new series
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds between two tokens
LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds of a request


@dataclass(frozen=True)
class Reading:
    """A number of `EngineThread.health` under the name and with the meaning that it has here."""

    source: str
    name: str
    meaning: str


GAUGES = (
    Reading("running", "liaoyuan_requests_running", "Requests in the batch."),
    Reading("waiting", "liaoyuan_requests_waiting", "Requests in the queue."),
    Reading("open", "liaoyuan_requests_open", "Requests that somebody waits for."),
    Reading("blocks", "liaoyuan_cache_blocks", "Blocks of the cache of keys and values."),
    Reading("free_blocks", "liaoyuan_cache_free_blocks", "Blocks that no running request holds."),
    Reading("cached_blocks", "liaoyuan_cache_prefix_blocks", "Free blocks whose content may be found again."),
    Reading("version", "liaoyuan_weights_version", "Version of the weights."),
    Reading("expert_imbalance", "liaoyuan_expert_imbalance_ratio", "Rows of the busiest process over the mean's."),
    Reading("expert_copies_bytes", "liaoyuan_expert_copies_bytes", "Memory for copies of experts in each process."),
)
COUNTERS = (
    Reading("steps", "liaoyuan_steps", "Batches computed; tokens by steps are the size of a batch."),
    Reading("computed_tokens", "liaoyuan_computed_tokens", "Tokens computed, of prompts and of completions."),
    Reading("prompt_tokens", "liaoyuan_prompt_tokens", "Tokens of prompts that came in."),
    Reading("generated_tokens", "liaoyuan_generated_tokens", "Tokens generated."),
    Reading("prefix_asked_tokens", "liaoyuan_prefix_cache_asked_tokens", "Tokens looked for in the prefix cache."),
    Reading("prefix_hit_tokens", "liaoyuan_prefix_cache_hit_tokens", "Tokens found in the prefix cache."),
    Reading("preemptions", "liaoyuan_preemptions", "Requests that gave up their blocks for others for a while."),
    Reading("expert_looks", "liaoyuan_expert_looks", "How often it was asked where experts should lie."),
    Reading("expert_moves", "liaoyuan_expert_moves", "Experts that were sent to another process."),
    Reading("expert_refusals", "liaoyuan_expert_refusals", "Moves of experts that a process refused."),
    Reading("failures", "liaoyuan_engine_failures", "Steps that failed."),
    Reading("moved", "liaoyuan_requests_moved", "Requests that went on in another worker when theirs had died."),
    Reading("given_up", "liaoyuan_requests_given_up", "Requests whose workers died again and again."),
)


WORKER_GAUGES = (  # of each worker, where prefill and decode are apart
    Reading("ready", "liaoyuan_worker_ready", "Whether this worker may be asked."),
    Reading("running", "liaoyuan_worker_requests_running", "Requests in this worker's batch."),
    Reading("waiting", "liaoyuan_worker_requests_waiting", "Requests in this worker's queue."),
    Reading("blocks", "liaoyuan_worker_cache_blocks", "Blocks of this worker's cache."),
    Reading("free_blocks", "liaoyuan_worker_cache_free_blocks", "Of these, held by no running request."),
    Reading("leases", "liaoyuan_worker_leases", "Prompts that are being handed over."),
)
WORKER_COUNTERS = (
    Reading("starts", "liaoyuan_worker_starts", "How often this worker was started."),
    Reading("computed_tokens", "liaoyuan_worker_computed_tokens", "Tokens that this worker computed."),
    Reading("blocks_sent", "liaoyuan_worker_blocks_sent", "Blocks of prompts that it handed over."),
    Reading("blocks_received", "liaoyuan_worker_blocks_received", "Blocks of prompts that it took over."),
    Reading("blocks_missing", "liaoyuan_worker_blocks_missing", "Blocks that did not come: it computed them itself."),
    Reading("leases_expired", "liaoyuan_worker_leases_expired", "Prompts whose taker fell silent."),
)


class Metrics:
    """The metrics of one app."""

    def __init__(self, health: Callable[[], Mapping[str, Any]], endpoints: Collection[str] = ()) -> None:
        """health: of the runner. endpoints: paths that have series of their own; may be added later."""
        self.endpoints, self._health = set(endpoints), health
        self.spent, self.started = Spent(), time.time()
        self._llama = LlamaMetrics(self.spent)
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(health))
        self._replies = self._counter("http_replies", "Replies by status.", "status")
        self._refusals = self._counter("refusals", "Requests refused (status 400 to 499).")
        self._aborts = self._counter("aborts", "Answers given up: the client went away, or the engine failed.")
        self.answers = self._counter("answers", "Answers by why they ended.", "reason")
        self.first_token = self._histogram("time_to_first_token", "From the request to its first token.", LONG)
        self.between_tokens = self._histogram("inter_token_latency", "Between two tokens of an answer.", SHORT)
        self.whole = self._histogram("request_latency", "From the request to its last token.", LONG)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics and their media type, in the newest format that the Accept header `accept` allows.

        llama.cpp's names are in the plain format alone: the newer one wants others.
        """
        encoder, media_type = choose_encoder(accept)
        text = encoder(self.registry)
        return (text if "openmetrics" in media_type else text + self._llama.text(self._health()).encode()), media_type

    def counted(self, path: str, send: Send) -> Send:
        """Return a send that counts the reply."""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                endpoint, status = self._endpoint(path), message["status"]
                self._replies.labels(endpoint, str(status)).inc()
                if 400 <= status < 500:
                    self._refusals.labels(endpoint).inc()
            await send(message)

        return counting

    @contextlib.contextmanager
    def watch(self, prompt: int) -> Iterator["Watch"]:
        """Give a watch over one answer of the calling request, to a prompt of so many tokens; one that was not told of
        its end was given up."""
        caller = CALLER.get()
        watch = Watch(self, self._endpoint(caller.endpoint), caller.arrived or time.monotonic(), prompt)
        try:
            yield watch
        finally:
            if not watch.ended:
                self._aborts.labels(watch.endpoint).inc()

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter("liaoyuan_" + name, meaning, ("endpoint", *labels), registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        whole = f"liaoyuan_{name}_seconds"
        return Histogram(whole, meaning, ("endpoint",), registry=self.registry, buckets=buckets)

    def _endpoint(self, path: str) -> str:
        long = path if path.startswith("/v1") else "/v1" + path  # OpenAI's paths are answered without it too
        return next((one for one in (path, long) if one in self.endpoints), OTHER)


class Watch:
    """Observes one answer."""

    def __init__(self, metrics: Metrics, endpoint: str, arrived: float, tokens: int) -> None:
        self._metrics, self.endpoint, self._arrived, self._tokens = metrics, endpoint, arrived, tokens
        self._last, self.ended = 0.0, False

    def saw(self, event: Event) -> None:
        """Observe an event as it comes."""
        metrics, now, count = self._metrics, time.monotonic(), len(event.tokens)
        if not count:
            return
        if not self._last:
            metrics.first_token.labels(self.endpoint).observe(now - self._arrived)
            metrics.spent.reading += now - self._arrived
        for _ in range(count if self._last else count - 1):  # several tokens of one step share its time
            metrics.between_tokens.labels(self.endpoint).observe((now - (self._last or now)) / count)
        metrics.spent.writing += now - (self._last or now)
        metrics.spent.further += count if self._last else count - 1
        self._tokens += count
        metrics.spent.longest = max(metrics.spent.longest, self._tokens)
        self._last = now

    def end(self, reason: str) -> None:
        """Observe why the answer ended."""
        self.ended = True
        self._metrics.whole.labels(self.endpoint).observe(time.monotonic() - self._arrived)
        self._metrics.answers.labels(self.endpoint, reason).inc()


class _Engine:
    """What the engine says of itself, read at each scrape."""

    def __init__(self, health: Callable[[], Mapping[str, Any]]) -> None:
        self._health = health

    def collect(self) -> Iterator[Metric]:
        state = self._health()
        yield GaugeMetricFamily("liaoyuan_alive", "Whether the engine runs.", float(bool(state.get("alive"))))
        yield from _families(GAUGES, COUNTERS, [((), state)])
        workers = [((worker["side"], str(worker["number"])), worker) for worker in state.get("workers", ())]
        yield from _families(WORKER_GAUGES, WORKER_COUNTERS, workers, ("side", "worker"))
        if state.get("blocks"):
            used = 1 - state["free_blocks"] / state["blocks"]
            yield GaugeMetricFamily("liaoyuan_cache_use_ratio", "Part of the cache that running requests hold.", used)
        if state.get("prefix_asked_tokens"):
            hits = state["prefix_hit_tokens"] / state["prefix_asked_tokens"]
            yield GaugeMetricFamily("liaoyuan_prefix_cache_hit_ratio", "Part of the tokens looked for found.", hits)


def _families(
    gauges: Sequence[Reading],
    counters: Sequence[Reading],
    states: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
    labels: Sequence[str] = (),
) -> Iterator[Metric]:
    """Yield what states say, each with its values of `labels`; what none says is left out."""
    for kind, readings in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
        for reading in readings:
            family = kind(reading.name, reading.meaning, labels=labels)
            for values, state in states:
                if reading.source in state:
                    family.add_metric(values, float(state[reading.source]))
            if family.samples:
                yield family
