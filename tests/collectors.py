"""OpenTelemetry collectors in this process that keep what they get."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2


class Collector:
    """Keeps decoded requests; `spans` and `points` flatten them."""

    def __init__(self):
        self.traces, self.metrics, self.status, self.refused = [], [], 200, []

    def spans(self):
        return [s for r in self.traces for x in r.resource_spans for y in x.scope_spans for s in y.spans]

    def points(self):
        """{metric: [(time in ns, value)]} in the order they arrived."""
        found = {}
        for request in self.metrics:
            for metric in (m for x in request.resource_metrics for y in x.scope_metrics for m in y.metrics):
                points = [(p.time_unix_nano, p.as_double) for p in metric.gauge.data_points]
                found.setdefault(metric.name, []).extend(points)
        return found


@contextmanager
def serve_http() -> Iterator[Collector]:
    """A collector over HTTP at its `endpoint`."""
    collector = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kinds = {
                "/v1/traces": (trace_service_pb2.ExportTraceServiceRequest, collector.traces),
                "/v1/metrics": (metrics_service_pb2.ExportMetricsServiceRequest, collector.metrics),
            }
            if self.path not in kinds or collector.status != 200:
                collector.refused.append(self.path)
                self.send_error(collector.status if self.path in kinds else 404)
                return
            message, into = kinds[self.path]
            into.append(message.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    collector.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield collector
    server.shutdown()
    server.server_close()
