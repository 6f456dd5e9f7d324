"""OpenTelemetry: metrics as OTLP gauges and events as spans, sent where MC_OTEL_ENDPOINT says.

The caller only fills two bounded queues; one thread of the sink sends them. A collector that is slow, away or
refuses costs the stream, never the training: it is said once and the run goes on.

Every logged value is a data point with the time of its `log` call, beside a gauge `step` of the same time, so a
curve arrives whole. (The SDK's own gauges would keep one value per export, and its batching threads would start
again in every forked process.)
"""

import collections
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megacontext_jax.errors import UserError
from megacontext_jax.telemetry import names

SEND_EVERY_S = 5.0
EXPORT_TIMEOUT_S = 2.0  # of one request, retries included
CLOSE_TIMEOUT_S = 4.0
MAX_WAITING = 4096  # calls of `log`, and events, kept for the next request; the oldest are dropped
BATCH = {"metrics": 64, "spans": 512}  # per request: under the 4 MB a gRPC collector takes
SCOPE = "megacontext_jax"

_PROTOCOLS = {"grpc": "grpc", "http/protobuf": "http"}
_SCHEMES = {"": "", "http": "", "https": "", "grpc": "grpc", "grpcs": "grpc"}
_PORTS = {4317: "grpc", 4318: "http"}


@dataclass(frozen=True)
class Endpoint:
    """Where and how to send: `protocol` is http or grpc, `target` a URL without path of signal, or host:port."""

    protocol: str
    target: str
    insecure: bool

    def describe(self) -> str:
        """`http http://host:4318` or `grpc host:4317 (TLS)`; without a user and password."""
        scheme, separator, rest = self.target.rpartition("://")
        shown = f"{self.protocol} {scheme}{separator}{rest.rpartition('@')[2]}"
        return shown if self.insecure or self.protocol == "http" else f"{shown} (TLS)"


def off_because(environ: Mapping[str, str] = os.environ) -> str:
    """Why there is no OpenTelemetry: the variable that is missing or forbids it; empty if there is."""
    if not environ.get("MC_OTEL_ENDPOINT", "").strip():
        return "MC_OTEL_ENDPOINT is not set"
    if environ.get("MC_DISABLE_TELEMETRY", "").strip().lower() in ("1", "true", "yes"):
        return "MC_DISABLE_TELEMETRY is set"
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "OTEL_SDK_DISABLED is set"
    return ""


def parse_endpoint(environ: Mapping[str, str] = os.environ) -> Endpoint:
    """MC_OTEL_ENDPOINT, MC_OTEL_INSECURE and OTEL_EXPORTER_OTLP_PROTOCOL as one `Endpoint`.

    The protocol is what OTEL_EXPORTER_OTLP_PROTOCOL says, else gRPC for grpc:// and port 4317, else HTTP.
    TLS for https://, grpcs:// and MC_OTEL_INSECURE=0.

    Raises:
        UserError: not an address, an unknown protocol, or two that contradict each other.
    """
    text = environ.get("MC_OTEL_ENDPOINT", "").strip()
    try:
        url = urlsplit(text if "://" in text else f"//{text}")
        port = url.port
        if url.scheme not in _SCHEMES or not url.hostname or url.query or url.fragment:
            raise ValueError
    except ValueError:
        raise UserError(
            f"MC_OTEL_ENDPOINT '{text}' is not an address; use http://HOST:4318 or grpc://HOST:4317."
        ) from None
    asked = environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "").strip().lower()
    if asked and asked not in _PROTOCOLS:
        raise UserError(f"OTEL_EXPORTER_OTLP_PROTOCOL '{asked}' is not supported; use http/protobuf or grpc.")
    by_scheme = _SCHEMES[url.scheme]
    if by_scheme and asked and _PROTOCOLS[asked] != by_scheme:
        raise UserError(
            f"MC_OTEL_ENDPOINT {url.scheme}://... is gRPC and OTEL_EXPORTER_OTLP_PROTOCOL is {asked}; "
            "change one of the two."
        )
    path = re.sub(r"/v1/(traces|metrics)$", "", url.path.rstrip("/"))
    by_port = "http" if url.path.strip("/") else _PORTS.get(port, "http")
    protocol = by_scheme or _PROTOCOLS.get(asked) or by_port
    insecure = environ.get("MC_OTEL_INSECURE", "1").strip().lower() not in ("0", "false", "no", "off")
    insecure = insecure and url.scheme not in ("https", "grpcs")
    if port is None and (protocol == "grpc" or not url.scheme):
        # a URL keeps the default port of its scheme; a bare host has none
        port = 4317 if protocol == "grpc" else 4318
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    place = host if port is None else f"{host}:{port}"
    if protocol == "grpc":
        return Endpoint("grpc", place, insecure)
    user = f"{url.netloc.rpartition('@')[0]}@" if "@" in url.netloc else ""
    return Endpoint("http", f"http{'' if insecure else 's'}://{user}{place}{path}", insecure)


def open_otel(
    service: str,
    run_id: str,
    environ: Mapping[str, str] = os.environ,
    say: Callable[[str], None] | None = None,
) -> "OtelSink | None":
    """The sink that the environment asks for, or None. Nothing is sent yet, so this does not wait.

    Args:
        service: the resource's `service.name`, as megacontext-train.
        run_id: the resource's `run.id`.
        environ: where MC_OTEL_ENDPOINT and its like are read. Headers and certificates are the exporters'
            own variables (OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_CERTIFICATE), read from the process.
        say: receives the one sentence of a failure; standard error by default.

    Raises:
        UserError: a bad address, or a package that is not installed.
    """
    if off_because(environ):
        return None
    endpoint = parse_endpoint(environ)
    try:
        exporters = _exporters(endpoint)
        from opentelemetry.sdk.resources import Resource
    except ImportError as error:
        raise UserError(
            f"MC_OTEL_ENDPOINT asks for OpenTelemetry over {endpoint.protocol} and a package is missing "
            f"({error}); install it with `pip install -e '.[otel]'` or unset MC_OTEL_ENDPOINT."
        ) from None
    except Exception as error:  # a certificate or a setting of the exporters' own variables
        raise UserError(f"OpenTelemetry cannot be set up ({error}); look at the OTEL_* variables.") from None
    say = say or (lambda sentence: print(sentence, file=sys.stderr, flush=True))
    return OtelSink(
        endpoint, exporters, Resource.create({"service.name": service, "run.id": run_id or "unnamed"}), say
    )


class OtelSink:
    """Sends metrics and events in the background. `failure` is a clause on the first loss, empty before."""

    def __init__(
        self, endpoint: Endpoint, exporters: dict[str, Any], resource: Any, say: Callable[[str], None]
    ):
        self.endpoint = endpoint
        self.failure = ""
        self._exporters = exporters
        self._resource = resource
        self._say = say
        self._waiting = {name: collections.deque(maxlen=MAX_WAITING) for name in BATCH}
        self._closing = threading.Event()
        self._report_lock = threading.Lock()
        self._reasons = _Reasons()
        self._logger = logging.getLogger("opentelemetry.exporter")

        self._tracer = _tracer(resource, lambda span: self._put("spans", span))
        self._thread: threading.Thread | None = threading.Thread(target=self._work, name="otel", daemon=True)
        # The exporters tell of every retry through logging; the first reason goes into our sentence instead.
        self._logger.addHandler(self._reasons)
        self._logger.propagate = False
        self._thread.start()

    def describe(self) -> str:
        """`http http://host:4318` or `grpc host:4317`."""
        return self.endpoint.describe()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Queues one data point per number; text and arrays are left to the other sinks."""
        points = {"step": float(step)}
        for key, value in values.items():
            value = value.tolist() if hasattr(value, "tolist") else value
            if isinstance(value, int | float):
                points[key] = float(value)
        self._put("metrics", (time.time_ns(), points))

    def event(self, kind: str, fields: Mapping[str, Any], session_id: str = "") -> None:
        """Queues a span of no length named `kind` with the attributes mc.session_id, mc.event_type, mc.<field>."""
        attributes = {"mc.session_id": session_id, "mc.event_type": kind}
        attributes |= {f"mc.{key}": _attribute(value) for key, value in fields.items()}
        now = time.time_ns()
        self._tracer.start_span(kind, start_time=now, attributes=attributes).end(end_time=now)

    def close(self, exit_code: int = 0) -> None:
        """Sends what is waiting, for CLOSE_TIMEOUT_S at the most. Closing twice is fine."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing.set()
        thread.join(CLOSE_TIMEOUT_S)
        if thread.is_alive():
            self._fail(f"the last records did not arrive at {self.describe()} in {CLOSE_TIMEOUT_S:.0f} s")
        for exporter in self._exporters.values():
            exporter.shutdown()  # ends a request that hangs
        if not thread.is_alive():
            self._logger.removeHandler(self._reasons)
            self._logger.propagate = True

    def _put(self, name: str, item: Any) -> None:
        waiting = self._waiting[name]
        if len(waiting) == MAX_WAITING:
            self._fail(f"{self.describe()} takes {name} too slowly and some were dropped")
        waiting.append(item)

    def _work(self) -> None:
        self._reasons.thread = threading.get_ident()
        while not self._closing.wait(SEND_EVERY_S):
            self._send()
        self._send()

    def _send(self) -> None:
        for name, waiting in self._waiting.items():
            arrived = True
            while waiting and arrived:  # after a failure the rest waits for the next round
                batch = [waiting.popleft() for _ in range(min(len(waiting), BATCH[name]))]
                arrived = self._export(name, batch)

    def _export(self, name: str, batch: list[Any]) -> bool:
        self._reasons.first = ""
        try:
            data = _metrics_data(batch, self._resource) if name == "metrics" else batch
            arrived = self._exporters[name].export(data).name == "SUCCESS"
        except Exception as error:
            arrived, self._reasons.first = False, str(error)
        if not arrived:
            self._fail(f"{name} do not arrive at {self.describe()} ({_reason(self._reasons.first)})")
        return arrived

    def _fail(self, clause: str) -> None:
        with self._report_lock:
            if self.failure:
                return
            self.failure = clause
        self._say(f"OpenTelemetry: {clause}; the run goes on and keeps trying.")


def preflight(message: str, environ: Mapping[str, str] = os.environ) -> str:
    """Sends one span `mc_preflight` and waits for it; returns where it arrived.

    Raises:
        UserError: OpenTelemetry is off, or the span did not arrive.
    """
    if why := off_because(environ):
        raise UserError(f"OpenTelemetry is off ({why}); change that and run this again.")
    sink = open_otel("megacontext-preflight", "preflight", environ, say=lambda sentence: None)
    sink.event("mc_preflight", {"message": message, "ok": True}, "preflight")
    sink.close()
    if sink.failure:
        raise UserError(f"OpenTelemetry: {sink.failure}; start the collector or correct MC_OTEL_ENDPOINT.")
    return sink.describe()


class _Reasons(logging.Handler):
    """Keeps the first message of the exporters' logging during a request of our thread."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.thread, self.first = 0, ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread and not self.first:
            self.first = record.getMessage()


def _exporters(endpoint: Endpoint) -> dict[str, Any]:
    if endpoint.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        options = {"endpoint": endpoint.target, "insecure": endpoint.insecure, "timeout": EXPORT_TIMEOUT_S}
        return {"metrics": OTLPMetricExporter(**options), "spans": OTLPSpanExporter(**options)}
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return {
        "metrics": OTLPMetricExporter(endpoint=f"{endpoint.target}/v1/metrics", timeout=EXPORT_TIMEOUT_S),
        "spans": OTLPSpanExporter(endpoint=f"{endpoint.target}/v1/traces", timeout=EXPORT_TIMEOUT_S),
    }


def _tracer(resource: Any, put: Callable[[Any], None]) -> Any:
    """A tracer that hands every ended span to `put`."""
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    class Queue(SpanProcessor):
        def on_end(self, span: Any) -> None:
            put(span)

    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(Queue())
    return provider.get_tracer(SCOPE)


def _metrics_data(batch: list[tuple[int, dict[str, float]]], resource: Any) -> Any:
    """[(time in ns, {name: value})] as one gauge per name, each with a data point per time."""
    from opentelemetry.sdk.metrics.export import (
        Gauge,
        Metric,
        MetricsData,
        NumberDataPoint,
        ResourceMetrics,
        ScopeMetrics,
    )
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    points: dict[str, list[Any]] = {}
    for at, values in batch:
        for name, value in values.items():
            points.setdefault(name, []).append(NumberDataPoint({}, 0, at, value))
    metrics = [Metric(name, names.meaning(name), "", Gauge(found)) for name, found in points.items()]
    scope = ScopeMetrics(InstrumentationScope(SCOPE), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _attribute(value: Any) -> str | bool | int | float:
    """A field as OTLP takes it: lists and mappings as JSON, None as an empty string."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return ""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
    return str(value).encode("utf-8", "replace").decode()  # half a character would cost the whole request


_CAUSES = (
    r"\[Errno -?\d+\] ([^'\")]+)",
    r"\[SSL: \w+\] ([^'(]+)",
    r"code: (\d+), reason: (.+)",
    r"[Ee]rror details: (?:.*: )?([^\]]+)",
)


def _reason(message: str) -> str:
    """The cause in an exporter's message, which wraps it in class names and addresses."""
    for pattern in _CAUSES:
        if found := re.search(pattern, message):
            return " ".join(found.groups()).strip()[:200]
    if not message or "timeout" in message or "timed out" in message:
        return f"no answer in {EXPORT_TIMEOUT_S:.0f} s"
    return message.splitlines()[0].rstrip(".")[:200]
