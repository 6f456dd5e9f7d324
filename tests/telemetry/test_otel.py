"""OpenTelemetry against real collectors in this process: an HTTP server and a gRPC server that keep what they get."""

import collections
import json
import logging
import math
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent import futures

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from megacontext_jax.errors import UserError
from megacontext_jax.telemetry import otel
from megacontext_jax.telemetry.names import METRICS, SPANS
from megacontext_jax.telemetry.sinks import open_metrics, read_metrics
from scripts import mc_otel_preflight
from tests.collectors import Collector, serve_http
from tests.infer.session_models import K, focus_chat


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("OTEL_", "MC_OTEL_", "WANDB_", "MEGACONTEXT_ENABLE_WANDB")) or name.endswith(
            "_proxy"
        ):
            monkeypatch.delenv(name)
    monkeypatch.delenv("MC_DISABLE_TELEMETRY", raising=False)


@pytest.fixture
def http_collector():
    with serve_http() as collector:
        yield collector


@pytest.fixture
def grpc_collector():
    collector = Collector()

    class Traces(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):
            collector.traces.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    class MetricsService(metrics_service_pb2_grpc.MetricsServiceServicer):
        def Export(self, request, context):
            collector.metrics.append(request)
            return metrics_service_pb2.ExportMetricsServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(MetricsService(), server)
    collector.endpoint = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield collector
    server.stop(None)


@pytest.fixture(params=["http", "grpc"])
def collector(request):
    return request.getfixturevalue(f"{request.param}_collector")


@pytest.fixture
def silent_port():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield server.getsockname()[1]


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def plain(attributes):
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


class TestArrival:
    def test_metrics_and_events_of_a_run(self, collector, tmp_path, monkeypatch):
        monkeypatch.setenv("MC_OTEL_ENDPOINT", collector.endpoint)
        said = []
        started = time.time_ns()
        with open_metrics(tmp_path / "d4", stage="base", say=said.append) as metrics:
            assert collector.endpoint.removeprefix("grpc://") in metrics.describe().split("| otel: ")[1]
            for step in range(3):
                metrics.log({"train/loss": np.float32(2.5 - step), "mc/lod_count/1": step, "note": "x"}, step)
            metrics.log({"mc/adv_delta_mean": math.nan, "ids": np.arange(3), "mc/residency_mean": True}, 3)
            fields = {
                "mean": np.float64(0.25),
                "p95": math.inf,
                "horizon": np.int32(32),
                "ok": True,
                "nothing": None,
                "lods": np.arange(3),
                "summary": {0: [np.float32(0.5), math.nan]},
                "text": "half \ud800 a character",
                "huge": 2**70,
            }
            metrics.event("delta_nll", fields, session_id="train_step_7")
            metrics.event("mc_preflight", {})
        assert said == []

        points = collector.points()
        assert points.keys() == {
            "step",
            "train/loss",
            "mc/lod_count/1",
            "mc/adv_delta_mean",
            "mc/residency_mean",
        }
        assert [value for _, value in points["step"]] == [0, 1, 2, 3]
        assert [value for _, value in points["train/loss"]] == [2.5, 1.5, 0.5]
        assert [at for at, _ in points["train/loss"]] == [at for at, _ in points["step"]][:3]
        assert all(started < at < time.time_ns() for at, _ in points["step"])
        assert math.isnan(points["mc/adv_delta_mean"][0][1])
        descriptions = {
            metric.name: metric.description
            for metric in collector.metrics[0].resource_metrics[0].scope_metrics[0].metrics
        }
        assert descriptions["mc/lod_count/1"] == METRICS["mc/lod_count/{l}"]

        first, second = collector.spans()
        assert (first.name, second.name) == ("delta_nll", "mc_preflight")
        assert plain(first.attributes) == {
            "mc.session_id": "train_step_7",
            "mc.event_type": "delta_nll",
            "mc.mean": 0.25,
            "mc.p95": math.inf,
            "mc.horizon": 32,
            "mc.ok": True,
            "mc.nothing": "",
            "mc.lods": "[0, 1, 2]",
            "mc.summary": '{"0": [0.5, "NaN"]}',
            "mc.text": "half ? a character",
            "mc.huge": str(2**70),
        }
        assert plain(second.attributes) == {"mc.session_id": "", "mc.event_type": "mc_preflight"}
        for resource in (
            collector.traces[0].resource_spans[0].resource,
            collector.metrics[0].resource_metrics[0].resource,
        ):
            attributes = plain(resource.attributes)
            assert attributes["service.name"] == "megacontext-train"
            assert attributes["run.id"] == "d4"
        assert len(read_metrics(tmp_path / "d4" / "metrics.jsonl")) == 4  # the file has it all the same

    def test_sends_while_the_run_goes_on(self, http_collector, monkeypatch):
        monkeypatch.setattr(otel, "SEND_EVERY_S", 0.05)
        sink = otel.open_otel("s", "r", {"MC_OTEL_ENDPOINT": http_collector.endpoint})
        sink.log({"a": 1.0}, 0)
        end = time.monotonic() + 5
        while not http_collector.metrics and time.monotonic() < end:
            time.sleep(0.01)
        assert http_collector.points()["a"][0][1] == 1.0
        sink.close()

    def test_much_is_sent_in_several_requests_and_whole(self, collector):
        sink = otel.open_otel("s", "r", {"MC_OTEL_ENDPOINT": collector.endpoint})
        for step in range(150):
            sink.log({f"m{i}": 0.5 for i in range(40)}, step)
            sink.event("e", {"step": step})
        sink.close()
        assert len(collector.metrics) == 3
        assert [value for _, value in collector.points()["step"]] == list(range(150))
        assert [plain(span.attributes)["mc.step"] for span in collector.spans()] == list(range(150))
        assert sink.failure == ""


class TestFailure:
    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_refused_connection_is_one_sentence_and_costs_no_time(
        self, scheme, tmp_path, monkeypatch, caplog
    ):
        monkeypatch.setattr(otel, "SEND_EVERY_S", 0.02)  # so that it fails while the run logs
        monkeypatch.setattr(otel, "EXPORT_TIMEOUT_S", 1.5)
        monkeypatch.setenv("MC_OTEL_ENDPOINT", f"{scheme}://127.0.0.1:{closed_port()}")
        said, seconds = [], []
        metrics = open_metrics(tmp_path, stage="base", say=said.append)
        for step in range(40):
            started = time.monotonic()
            metrics.log({f"train/m{i}": 1.0 for i in range(40)}, step)
            metrics.event("mc_batch_stats", {"variants_total": step})
            seconds.append(time.monotonic() - started)
            time.sleep(0.02)
        started = time.monotonic()
        metrics.close()
        assert time.monotonic() - started < otel.CLOSE_TIMEOUT_S + 0.5
        assert statistics.median(seconds) < 0.05
        assert len(said) == 1
        assert "refused" in said[0]
        assert "127.0.0.1" in said[0]
        assert said[0].count(". ") == 0
        assert "\n" not in said[0]
        assert caplog.records == []  # the exporters' own messages, one per retry, are kept quiet
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 40
        assert logging.getLogger("opentelemetry.exporter").propagate

    @pytest.mark.parametrize("scheme", ["http", "grpc"])
    def test_silent_collector_does_not_hold_up_the_end(self, scheme, silent_port):
        code = (
            "import sys, time\n"
            "from megacontext_jax.telemetry import otel\n"
            "otel.CLOSE_TIMEOUT_S = 1.0\n"
            "sink = otel.open_otel('s', 'r')\n"
            "sink.log({'a': 1.0}, 0); sink.event('e', {})\n"
            "started = time.monotonic(); sink.close(); assert time.monotonic() - started < 1.5\n"
        )
        environ = os.environ | {"MC_OTEL_ENDPOINT": f"{scheme}://127.0.0.1:{silent_port}"}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=10
        )
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("\n") == 1
        assert "did not arrive" in run.stderr

    def test_refusal_names_its_reason_and_recovery_is_used(self, http_collector, monkeypatch):
        http_collector.status = 400
        monkeypatch.setattr(otel, "SEND_EVERY_S", 0.05)
        said = []
        sink = otel.open_otel("s", "r", {"MC_OTEL_ENDPOINT": http_collector.endpoint}, said.append)
        sink.log({"a": 1.0}, 0)
        end = time.monotonic() + 5
        while not said and time.monotonic() < end:
            time.sleep(0.01)
        http_collector.status = 200
        sink.log({"a": 2.0}, 1)
        sink.close()
        assert len(said) == 1
        assert "metrics do not arrive" in said[0]
        assert "400 Bad Request" in said[0]
        assert [value for _, value in http_collector.points()["a"]] == [2.0]

    def test_after_a_failure_the_rest_waits_for_the_next_round(self, http_collector):
        http_collector.status = 400
        sink = otel.open_otel("s", "r", {"MC_OTEL_ENDPOINT": http_collector.endpoint}, lambda sentence: None)
        for step in range(300):
            sink.log({}, step)
            sink.event("e", {})
        sink.close()
        assert http_collector.refused == ["/v1/metrics", "/v1/traces"]

    def test_overflow_drops_the_oldest_and_says_so(self, http_collector, monkeypatch):
        monkeypatch.setattr(otel, "MAX_WAITING", 5)
        said = []
        sink = otel.open_otel("s", "r", {"MC_OTEL_ENDPOINT": http_collector.endpoint}, said.append)
        for step in range(8):
            sink.log({}, step)
        sink.close()
        assert [value for _, value in http_collector.points()["step"]] == [3, 4, 5, 6, 7]
        assert len(said) == 1
        assert "dropped" in said[0]

    def test_closing_twice_and_an_idle_sink(self, http_collector):
        sink = otel.open_otel("s", "r", {"MC_OTEL_ENDPOINT": http_collector.endpoint})
        sink.close()
        sink.close(exit_code=1)
        assert (http_collector.metrics, http_collector.traces) == ([], [])

    @pytest.mark.parametrize(
        ("message", "reason"),
        [
            ("", "no answer in 2 s"),
            ("Failed to export spans batch due to timeout, max retries or shutdown.", "no answer in 2 s"),
            (
                "... (Caused by SSLError(SSLError(1, '[SSL: WRONG] wrong version (_ssl.c:1)')))",
                "wrong version",
            ),
            ("Failed. Error details: errors resolving x:1: [field:lookup: Name not found]", "Name not found"),
            ("Failed to encode span batch: bad\nmore", "Failed to encode span batch: bad"),
        ],
    )
    def test_reasons(self, message, reason):
        assert otel._reason(message) == reason


class TestSettings:
    @pytest.mark.parametrize(
        ("endpoint", "more", "expected"),
        [
            ("http://h:4318", {}, "http http://h:4318"),
            ("http://h:4318/", {}, "http http://h:4318"),
            ("http://h:4318/v1/traces", {}, "http http://h:4318"),
            ("https://h/otel/v1/metrics/", {}, "http https://h/otel"),
            ("http://h:9999", {}, "http http://h:9999"),
            ("h:4318", {}, "http http://h:4318"),
            ("h", {}, "http http://h:4318"),
            ("h:4318/v1/traces", {}, "http http://h:4318"),
            ("http://h:4317/v1/traces", {}, "http http://h:4317"),
            ("http://user:secret@h:4318", {}, "http http://h:4318"),
            ("http://h:4317", {}, "grpc h:4317"),
            ("h:4317", {}, "grpc h:4317"),
            ("grpc://h:9", {}, "grpc h:9"),
            ("grpc://h", {}, "grpc h:4317"),
            ("grpc://[::1]:4317", {}, "grpc [::1]:4317"),
            ("grpcs://h", {}, "grpc h:4317 (TLS)"),
            ("https://h:4317", {}, "grpc h:4317 (TLS)"),
            ("http://h:4317", {"MC_OTEL_INSECURE": "0"}, "grpc h:4317 (TLS)"),
            ("http://h:4318", {"MC_OTEL_INSECURE": "0"}, "http https://h:4318"),
            ("https://h:4317", {"MC_OTEL_INSECURE": "1"}, "grpc h:4317 (TLS)"),
            ("http://h:4318", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc h:4318"),
            ("http://h:4317", {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http http://h:4317"),
        ],
    )
    def test_endpoints(self, endpoint, more, expected):
        assert otel.parse_endpoint({"MC_OTEL_ENDPOINT": endpoint, **more}).describe() == expected

    def test_user_is_sent_though_not_shown(self):
        endpoint = otel.parse_endpoint({"MC_OTEL_ENDPOINT": "http://User:Secret@h:4318"})
        assert endpoint.target == "http://User:Secret@h:4318"

    @pytest.mark.parametrize(
        ("endpoint", "protocol", "sentence"),
        [
            ("ftp://h:4318", "", "MC_OTEL_ENDPOINT 'ftp://h:4318' is not an address; use http://HOST:4318"),
            ("http://h:port", "", "is not an address"),
            ("http://:4318", "", "is not an address"),
            ("http://[h:4318", "", "is not an address"),
            ("http://h:4318?token=1", "", "is not an address"),
            ("http://h:4318", "http/json", "'http/json' is not supported; use http/protobuf or grpc"),
            ("grpc://h:4317", "http/protobuf", "is gRPC and OTEL_EXPORTER_OTLP_PROTOCOL is http/protobuf"),
        ],
    )
    def test_bad_endpoints_are_one_sentence(self, endpoint, protocol, sentence):
        environ = {"MC_OTEL_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
        with pytest.raises(UserError) as error:
            otel.open_otel("s", "r", environ)
        assert sentence in str(error.value)

    def test_off_unless_asked_for(self, tmp_path):
        with open_metrics(tmp_path, stage="base") as metrics:
            metrics.event("delta_nll", {"mean": 0.5})
            assert metrics.describe().endswith("| otel: off (MC_OTEL_ENDPOINT is not set)")
        assert otel.open_otel("s", "r", {"MC_OTEL_ENDPOINT": " "}) is None

    @pytest.mark.parametrize(
        ("variable", "value", "off"),
        [
            ("MC_DISABLE_TELEMETRY", "1", True),
            ("MC_DISABLE_TELEMETRY", "true", True),
            ("MC_DISABLE_TELEMETRY", "YES", True),
            ("MC_DISABLE_TELEMETRY", "0", False),
            ("MC_DISABLE_TELEMETRY", "", False),
            ("OTEL_SDK_DISABLED", "true", True),
        ],
    )
    def test_turned_off(self, variable, value, off, http_collector, tmp_path, monkeypatch):
        monkeypatch.setenv("MC_OTEL_ENDPOINT", http_collector.endpoint)
        monkeypatch.setenv(variable, value)
        with open_metrics(tmp_path, stage="base") as metrics:
            assert (f"otel: off ({variable} is set)" in metrics.describe()) == off
            metrics.log({"a": 1.0}, 0)
            metrics.event("delta_nll", {"mean": 0.5})
        assert (not http_collector.metrics) == off
        assert (not http_collector.traces) == off

    @pytest.mark.parametrize(
        ("endpoint", "package"),
        [
            ("http://h:4318", "opentelemetry.exporter.otlp.proto.http.metric_exporter"),
            ("grpc://h:4317", "opentelemetry.exporter.otlp.proto.grpc.metric_exporter"),
            ("grpc://h:4317", "opentelemetry.sdk.resources"),
        ],
    )
    def test_missing_package_is_one_sentence_at_the_start(self, endpoint, package, tmp_path, monkeypatch):
        monkeypatch.setenv("MC_OTEL_ENDPOINT", endpoint)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=r"over (http|grpc) and a package is missing .*'\.\[otel\]'"):
            open_metrics(tmp_path, stage="base")
        assert not (tmp_path / "metrics.jsonl").exists()

    def test_bad_setting_of_the_exporters_is_one_sentence(self, monkeypatch):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "zip")
        with pytest.raises(UserError, match=r"cannot be set up .*zip.* OTEL_\* variables"):
            otel.open_otel("s", "r", {"MC_OTEL_ENDPOINT": "grpc://h:4317"})

    def test_refused_start_ends_the_sink(self, http_collector, tmp_path, monkeypatch):
        monkeypatch.setenv("MC_OTEL_ENDPOINT", http_collector.endpoint)
        monkeypatch.setenv("MEGACONTEXT_ENABLE_WANDB", "1")
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        with pytest.raises(UserError, match="wandb cannot be reached"):
            open_metrics(tmp_path, stage="base")
        assert "otel" not in [thread.name for thread in threading.enumerate()]


class TestPreflight:
    def test_arrival(self, collector, monkeypatch, capsys):
        monkeypatch.setenv("MC_OTEL_ENDPOINT", collector.endpoint)
        assert not mc_otel_preflight.main(["--message", "it is me"])
        (span,) = collector.spans()
        attributes = plain(span.attributes)
        assert span.name == attributes["mc.event_type"] == "mc_preflight"
        assert (attributes["mc.message"], attributes["mc.ok"]) == ("it is me", True)
        resource = plain(collector.traces[0].resource_spans[0].resource.attributes)
        assert resource["service.name"] == "megacontext-preflight"
        assert capsys.readouterr().out.startswith("The span mc_preflight arrived: ")

    def test_status_is_2_and_one_sentence_without_a_collector(self):
        environ = os.environ | {"MC_OTEL_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
        command = [sys.executable, "-m", "scripts.mc_otel_preflight"]
        run = subprocess.run(command, env=environ, capture_output=True, text=True)
        assert run.returncode == 2
        assert run.stdout == ""
        assert run.stderr.startswith("error: OpenTelemetry: spans do not arrive at http http://127.0.0.1:")
        assert run.stderr.count("\n") == 1

    def test_off_is_an_error(self):
        with pytest.raises(UserError, match="OpenTelemetry is off \\(MC_OTEL_ENDPOINT is not set\\)"):
            mc_otel_preflight.main([])


def test_span_limits_do_not_cut_long_lists():
    assert len(json.loads(otel._attribute(list(range(5000))))) == 5000


def test_what_a_working_context_does_arrives(http_collector, monkeypatch):
    monkeypatch.setenv("MC_OTEL_ENDPOINT", http_collector.endpoint)
    with focus_chat(lens="learned").watched() as chat, chat.new_session() as session:
        session.append(np.arange(100, dtype=np.uint32))
        said = len(list(session.answer(max_tokens=40, temperature=1.5, seed=3)))
        told = session.memory.statistics()
    found = collections.defaultdict(list)
    for span in http_collector.spans():
        attributes = {a.key.removeprefix("mc."): a.value for a in span.attributes}
        assert attributes["session_id"].string_value.startswith("infer_")
        assert attributes.keys() - {"session_id", "event_type"} <= set(SPANS[span.name])
        found[span.name].append(attributes)
    assert found.keys() == {"focus_allocator", "lensnet_usage", "gistnet_usage", "kv_cache"}

    def total(name, field):
        return sum(x[field].int_value for x in found[name])

    assert len(found["focus_allocator"]) == len(found["lensnet_usage"]) == told["refocuses"]
    assert total("focus_allocator", "num_expand") == told["expands"]
    assert total("focus_allocator", "num_collapse") == told["collapses"]
    assert total("kv_cache", "kept") == told["kept"] > 0
    # tokens that were decoded entered the cache one by one
    assert total("kv_cache", "recomputed") == sum(told["recomputed"].values()) - said
    assert total("gistnet_usage", "block_tokens") >= 100 // K * K
