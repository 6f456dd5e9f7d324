"""Downloads from a local server that breaks, lies, refuses and changes its mind."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megacontext_jax.data import shards
from megacontext_jax.data.download import download
from megacontext_jax.errors import UserError


def parquet_bytes(seed: int = 0, size: int = 200_000) -> bytes:
    text = np.random.default_rng(seed).bytes(size).hex()
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [text[:100], text[100:]]}), sink, compression="none")
    return sink.getvalue()


DATA = parquet_bytes()


@dataclass
class Resource:
    """How the server treats one path; lists are used up request by request."""

    data: bytes = DATA
    etag: str | None = '"v1"'
    ranges: bool = True
    announce_length: bool = True
    token: str | None = None
    location: str | None = None
    headers: dict = field(default_factory=dict)
    statuses: list = field(default_factory=list)
    breaks: list = field(default_factory=list)  # send only so many bytes, then close the connection
    hang: threading.Event | None = None  # after half of the body, wait for it
    requests: list = field(default_factory=list)  # what was asked: (Range, Authorization, status)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        resource = self.server.resources.get(self.path.strip("/"))
        if resource is None:
            return self.send_error(404)
        asked, token = self.headers.get("Range"), self.headers.get("Authorization")
        data, status, start = resource.data, 200, 0
        if resource.statuses:
            status = resource.statuses.pop(0)
        elif resource.token and token != f"Bearer {resource.token}":
            status = 401
        elif resource.location:
            status = 302
        elif asked and resource.ranges and self.headers.get("If-Range") in (None, resource.etag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(data) else 416
        resource.requests.append((asked, token, status))
        self.send_response(status)
        for name, value in resource.headers.items():
            self.send_header(name, value)
        if status == 302:
            self.send_header("Location", resource.location)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if status not in (200, 206):
            return self.end_headers()
        if resource.etag:
            self.send_header("ETag", resource.etag)
        if resource.announce_length:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if resource.breaks:
            body = body[: resource.breaks.pop(0)]
        if resource.hang and not resource.hang.is_set():
            self.wfile.write(body[: len(body) // 2])
            resource.hang.wait(20)
            return None
        self.wfile.write(body)
        return None


@pytest.fixture
def server(monkeypatch):
    for name in ("HF_TOKEN", shards.URL_VARIABLE, "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.resources = {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def fetch(server, folder, *names, **options):
    options = {"backoff_s": 0.01, "stream": io.StringIO(), **options}
    names = names or ("a.parquet",)
    return download([(f"{server.url}/{name}", folder / name) for name in names], **options)


def assert_only(folder: Path, *names: str) -> None:
    assert sorted(os.listdir(folder)) == sorted(names)
    for name in names:
        assert (folder / name).read_bytes() == DATA


def test_many_files_in_parallel_and_only_once(server, tmp_path):
    names = [f"{i}.parquet" for i in range(9)]
    server.resources = {name: Resource() for name in names}
    stream = io.StringIO()
    assert fetch(server, tmp_path, *names, workers=4, stream=stream) == [tmp_path / name for name in names]
    assert_only(tmp_path, *names)
    assert "MB" in stream.getvalue()
    assert "\r" not in stream.getvalue()
    fetch(server, tmp_path, *names)
    assert all(len(resource.requests) == 1 for resource in server.resources.values())


def test_broken_connections_resume_where_they_stopped(server, tmp_path):
    resource = server.resources["a.parquet"] = Resource(breaks=[150_000, 0, 100_000])
    fetch(server, tmp_path, attempts=3)
    assert_only(tmp_path, "a.parquet")
    asked = [int((r or "bytes=0-")[6:-1]) for r, _, _ in resource.requests]
    assert asked[0] == 0
    assert 100_000 < asked[1] == asked[2] < asked[3]
    assert [status for _, _, status in resource.requests] == [200, 206, 206, 206]


def test_progress_resets_the_patience_but_standing_still_ends_it(server, tmp_path):
    server.resources["a.parquet"] = Resource(breaks=[60_000] * 6)
    fetch(server, tmp_path, attempts=2)
    assert_only(tmp_path, "a.parquet")
    resource = server.resources["b.parquet"] = Resource(breaks=[60_000] + [0] * 9)
    with pytest.raises(UserError, match=r"b\.parquet: the connection .*\(3 attempts\).*continues where it"):
        fetch(server, tmp_path, "b.parquet", attempts=3)
    assert len(resource.requests) == 3
    assert not (tmp_path / "b.parquet").exists()
    resource.breaks.clear()
    fetch(server, tmp_path, "b.parquet")
    assert_only(tmp_path, "a.parquet", "b.parquet")
    assert resource.requests[-1][0] is not None  # the second call resumed


def test_a_server_without_ranges_starts_over(server, tmp_path):
    resource = server.resources["a.parquet"] = Resource(ranges=False, breaks=[200_000, 100_000])
    fetch(server, tmp_path)
    assert_only(tmp_path, "a.parquet")
    assert [status for _, _, status in resource.requests] == [200, 200, 200]


def test_a_server_without_lengths(server, tmp_path):
    server.resources["a.parquet"] = Resource(announce_length=False, breaks=[200_000])
    fetch(server, tmp_path)
    assert_only(tmp_path, "a.parquet")


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_that_changes_in_between_is_not_mixed(server, tmp_path, etags):
    # without an ETag only another length can tell
    other = parquet_bytes(1, 200_000 if etags else 190_000)
    assert (len(other) == len(DATA)) == etags
    resource = server.resources["a.parquet"] = Resource(
        data=other, etag='"v0"' if etags else None, breaks=[150_000] * 9
    )
    with pytest.raises(UserError):
        fetch(server, tmp_path, attempts=1)
    assert (tmp_path / "a.parquet.part").stat().st_size > 100_000
    resource.data, resource.etag = DATA, '"v1"' if etags else None
    resource.breaks.clear()
    fetch(server, tmp_path)
    assert_only(tmp_path, "a.parquet")


def test_a_part_of_another_address_is_not_continued(server, tmp_path):
    server.resources["x.parquet"] = Resource(data=parquet_bytes(1), breaks=[150_000])
    server.resources["a.parquet"] = Resource()
    with pytest.raises(UserError):
        download([(f"{server.url}/x.parquet", tmp_path / "a.parquet")], attempts=1, stream=io.StringIO())
    fetch(server, tmp_path)
    assert_only(tmp_path, "a.parquet")
    assert server.resources["a.parquet"].requests[0][0] is None


def test_busy_server_is_tried_again(server, tmp_path):
    resource = server.resources["a.parquet"] = Resource(
        statuses=[503, 429, 500], headers={"Retry-After": "0"}
    )
    stream = io.StringIO()
    fetch(server, tmp_path, backoff_s=30.0, stream=stream)  # the server's own waiting time counts
    assert_only(tmp_path, "a.parquet")
    assert len(resource.requests) == 4
    assert "a.parquet: the server answers 503; trying again in 0 s" in stream.getvalue()


def test_a_range_the_server_refuses_starts_over(server, tmp_path):
    resource = server.resources["a.parquet"] = Resource(breaks=[150_000])
    with pytest.raises(UserError):
        fetch(server, tmp_path, attempts=1)
    resource.statuses = [416]
    fetch(server, tmp_path)
    assert_only(tmp_path, "a.parquet")


def test_killed_between_the_last_byte_and_the_rename(server, tmp_path):
    resource = server.resources["a.parquet"] = Resource(breaks=[len(DATA) - 10_000])
    with pytest.raises(UserError):
        fetch(server, tmp_path, attempts=1)
    (tmp_path / "a.parquet.part").write_bytes(DATA)
    fetch(server, tmp_path)
    assert_only(tmp_path, "a.parquet")
    assert len(resource.requests) == 1


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (404, r"a\.parquet does not exist \(404\)"),
        (401, r"refuses .*a\.parquet \(401\): set HF_TOKEN"),
        (403, r"refuses .*a\.parquet \(403\): set HF_TOKEN"),
        (416, r"answers 416 to .*a\.parquet"),
        (503, r"a\.parquet: the server answers 503 \(5 attempts\)"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(server, tmp_path, status, words):
    resource = server.resources["a.parquet"] = Resource(statuses=[status] * 9)
    with pytest.raises(UserError, match=words):
        fetch(server, tmp_path)
    assert len(resource.requests) == (5 if status == 503 else 1)
    assert_only(tmp_path)


@pytest.mark.parametrize("data", [DATA[:-5000], b"<html>Please log in</html>"])
def test_a_complete_answer_that_is_no_parquet_file(server, tmp_path, data):
    server.resources["a.parquet"] = Resource(data=data)
    with pytest.raises(UserError, match=r"what arrived is not the file: .* not a complete parquet file"):
        fetch(server, tmp_path, attempts=2)
    assert_only(tmp_path)


def test_a_damaged_file_of_the_final_name_is_fetched_again(server, tmp_path):
    server.resources["a.parquet"] = Resource()
    (tmp_path / "a.parquet").write_bytes(DATA[:-100])
    stream = io.StringIO()
    fetch(server, tmp_path, stream=stream)
    assert_only(tmp_path, "a.parquet")
    assert "a.parquet is damaged and is fetched again" in stream.getvalue()


def test_the_token_is_sent_but_not_to_the_storage_host(server, tmp_path, monkeypatch):
    storage = server.resources["storage"] = Resource()
    hub = server.resources["a.parquet"] = Resource(
        token="secret", location=f"http://localhost:{server.server_port}/storage"
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with pytest.raises(UserError, match="set HF_TOKEN"):
        fetch(server, tmp_path)
    with pytest.raises(UserError, match="token in HF_TOKEN has no access"):
        fetch(server, tmp_path, token="wrong")
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(server, tmp_path)
    assert_only(tmp_path, "a.parquet")
    assert hub.requests[-1][1] == "Bearer secret"
    assert [token for _, token, _ in storage.requests] == [None]


@pytest.mark.parametrize("honest", [True, False])
def test_the_checksum_of_the_hub_is_held_against_the_file(server, tmp_path, honest):
    digest = hashlib.sha256(DATA if honest else b"another file").hexdigest()
    server.resources["storage"] = Resource()
    server.resources["a.parquet"] = Resource(
        location=f"{server.url}/storage", headers={"X-Linked-ETag": f'"{digest}"'}
    )
    if honest:
        fetch(server, tmp_path)
        assert_only(tmp_path, "a.parquet")
    else:
        with pytest.raises(UserError, match="SHA-256"):
            fetch(server, tmp_path, attempts=2)
        assert_only(tmp_path)


def test_no_network_is_one_sentence(server, tmp_path):
    url = f"{server.url}/a.parquet"
    server.server_close()
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+ refuses connections \(2 attempts\)"):
        download([(url, tmp_path / "a.parquet")], attempts=2, backoff_s=0.01, stream=io.StringIO())
    with pytest.raises(
        UserError, match=r"no-such-host\.invalid cannot be resolved, there seems to be no network"
    ):
        download([("http://no-such-host.invalid/a", tmp_path / "a")], attempts=1, stream=io.StringIO())
    with pytest.raises(UserError, match="Cannot download shards/a"):
        download([("shards/a", tmp_path / "a")], stream=io.StringIO())


def test_one_bad_file_stops_the_others_soon(server, tmp_path):
    server.resources = {
        "slow.parquet": Resource(statuses=[503] * 9),
        "gone.parquet": Resource(statuses=[404]),
    }
    with pytest.raises(UserError, match=r"gone\.parquet does not exist"):
        fetch(server, tmp_path, "slow.parquet", "gone.parquet", workers=2, backoff_s=30.0)


def test_two_downloads_of_the_same_file_do_not_mix(server, tmp_path):
    resource = server.resources["a.parquet"] = Resource(breaks=[100_000, 100_000])
    threads = [threading.Thread(target=fetch, args=(server, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_only(tmp_path, "a.parquet")
    assert len(resource.requests) == 3  # one downloader, two breaks; the others found it done


# The command


def command(server, *args, **options):
    line = [sys.executable, "-m", "megacontext_jax.data.shards", "--base-url", server.url, *map(str, args)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_shard_names():
    assert shards.shard_names("fineweb_edu", 2) == ["shard_00000.parquet", "shard_00001.parquet"]
    assert shards.shard_names("climbmix", 1) == ["shard_00000.parquet", "shard_06542.parquet"]
    assert len(shards.shard_names("fineweb_edu", -1)) == 1823
    assert len(set(shards.shard_names("climbmix", -1))) == 6543
    for bad in (0, -2, 1824):
        with pytest.raises(UserError, match=f"1823 shards to choose from, not {bad}"):
            shards.shard_names("fineweb_edu", bad)


def test_addresses_and_folders(server, tmp_path, monkeypatch):
    server.resources = {f"data/shard_0{i}.parquet": Resource() for i in ("0000", "0001", "6542")}
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv(shards.URL_VARIABLE, f"{server.url}/data/")
    shards.download_dataset("climbmix", 1)
    assert_only(tmp_path / "base_data_climbmix", "shard_00000.parquet", "shard_06542.parquet")
    shards.download_dataset("fineweb_edu", 2)
    assert_only(tmp_path / "base_data", "shard_00000.parquet", "shard_00001.parquet")
    assert shards.DATASETS["climbmix"].url.startswith(
        "https://huggingface.co/datasets/karpathy/climbmix-400b"
    )


def test_the_command_ends_with_status_2_and_one_sentence(server, tmp_path):
    server.resources = {"shard_00000.parquet": Resource()}
    process = command(server, "-n", 2, "--out", tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"error: {server.url}/shard_00001.parquet does not exist (404)")


def test_killed_and_started_again_the_command_resumes(server, tmp_path):
    hang = threading.Event()
    server.resources = {"shard_00000.parquet": Resource(hang=hang), "shard_00001.parquet": Resource()}
    process = command(server, "-n", 2, "--out", tmp_path)
    part, done = tmp_path / "shard_00000.parquet.part", tmp_path / "shard_00001.parquet"
    deadline = threading.Event()
    for _ in range(600):
        if done.exists() and part.exists() and part.stat().st_size > 100_000:
            break
        deadline.wait(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hang.set()
    size = part.stat().st_size
    assert 100_000 < size < len(DATA)
    process = command(server, "-n", 2, "--out", tmp_path)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.startswith("2 shards, 0.00 GB, in ")
    assert_only(tmp_path, "shard_00000.parquet", "shard_00001.parquet")
    assert [r for r, _, _ in server.resources["shard_00000.parquet"].requests] == [None, f"bytes={size}-"]
    assert len(server.resources["shard_00001.parquet"].requests) == 1
