"""Files over HTTP: parallel, resumable, verified before they get their name.

A file grows as `<name>.part`; `<name>.part.json` remembers whose bytes they are. After an interruption the
rest is asked for with Range and If-Range. Length, the hub's SHA-256 where it is given, and the caller's check
come before the rename, so that a file of the final name is always complete.
"""

import fcntl
import hashlib
import json
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from urllib.parse import urlsplit

import requests

from megacontext_jax.data.rowgroups import check_shard
from megacontext_jax.errors import UserError
from megacontext_jax.files import friendly_os_errors, write_bytes
from megacontext_jax.telemetry.progress import Progress, is_terminal

# Small, because the bytes of an unfinished read are lost when a connection breaks.
_CHUNK_BYTES = 32 * 1024
_TIMEOUT_S = (10, 60)  # to connect, between two packets
_LONGEST_WAIT_S = 60.0
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)

check_parquet = partial(check_shard, column=None)
"""The default check: a readable parquet footer and at least one row."""


def download(
    files: Iterable[tuple[str, str | Path]],
    *,
    workers: int = 4,
    token: str | None = None,
    check: Callable[[Path], Any] | None = check_parquet,
    attempts: int = 5,
    backoff_s: float = 1.0,
    label: str = "download",
    stream: TextIO | None = None,
) -> list[Path]:
    """Downloads (url, path) pairs with `workers` threads; returns the paths, those already complete included.

    `token` (default: HF_TOKEN) goes to the host of each url as a bearer token, over https or to this machine
    only. `check` gets a finished file before its rename and raises UserError if it is no good; an existing
    file that fails it is fetched again. `attempts` failures in a row give up, waiting `backoff_s`, twice
    that, ... in between; new bytes start the count anew. Raises UserError in one sentence; a second call
    resumes.
    """
    jobs = [(url, Path(path)) for url, path in files]
    waiting = [(url, path) for url, path in jobs if not _is_complete(path, check)]
    if waiting:
        token = token or os.environ.get("HF_TOKEN") or None
        _Download(waiting, token, check, attempts, backoff_s, label, stream or sys.stderr).run(workers)
    return [path for _, path in jobs]


def _is_complete(path: Path, check: Callable[[Path], Any] | None) -> bool:
    if not path.exists():
        return False
    try:
        if check is not None:
            check(path)
    except UserError:
        return False
    return True


class _RetryError(Exception):
    """This attempt failed, another may not; `wait_s` if the server named a time."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


class _StoppedError(Exception):
    """Another file failed for good."""


class _Download:
    def __init__(self, jobs, token, check, attempts, backoff_s, label, stream):
        self._jobs: Sequence[tuple[str, Path]] = jobs
        self._token, self._check = token, check
        self._attempts, self._backoff_s = attempts, backoff_s
        self._stream = stream
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._totals: dict[Path, int] = {}
        found = sum(_size(_part(path)) for _, path in jobs)
        self._progress = Progress(label, unit="B", initial=found, stream=stream)

    def run(self, workers: int) -> None:
        pending: queue.SimpleQueue = queue.SimpleQueue()
        errors: list[BaseException] = []
        for job in self._jobs:
            pending.put(job)

        def work() -> None:
            try:
                while not self._stop.is_set():
                    self._fetch(*pending.get_nowait())
            except (queue.Empty, _StoppedError):
                pass
            except BaseException as error:  # handed to the main thread
                errors.append(error)
                self._stop.set()

        # Daemons, so that Ctrl-C does not wait for a silent server; a .part file may be cut off anywhere.
        count = max(1, min(workers, len(self._jobs)))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        with self._progress:
            try:
                for thread in threads:
                    thread.start()
                while not errors and any(thread.is_alive() for thread in threads):
                    for thread in threads:
                        thread.join(0.05)
            finally:
                self._stop.set()
            for thread in threads:
                thread.join(1.0)
            if errors:
                raise errors[0]

    def _fetch(self, url: str, path: Path) -> None:
        with friendly_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(_part(path), self._stop) as file:
                if _is_complete(path, self._check):
                    return  # another process was faster
                if path.exists():
                    self._note(f"{path} is damaged and is fetched again")
                self._fetch_into(file, url, path)

    def _fetch_into(self, file: BinaryIO, url: str, path: Path) -> None:
        furthest, failures = file.seek(0, os.SEEK_END), 0
        while True:
            try:
                self._attempt(file, url, path)
                break
            except _RetryError as error:
                reason, wait_s = str(error), error.wait_s
            have = file.seek(0, os.SEEK_END)
            if have > furthest:
                furthest, failures = have, 0
            failures += 1
            if failures >= self._attempts:
                raise UserError(
                    f"Cannot download {url}: {reason} ({failures} attempts); check the network or the "
                    f"address and run the same command again, it continues where it stopped."
                )
            wait_s = self._backoff_s * 2 ** (failures - 1) if wait_s is None else wait_s
            self._note(f"{path.name}: {reason}; trying again in {wait_s:.3g} s")
            if self._stop.wait(wait_s):
                raise _StoppedError
        os.fsync(file.fileno())
        os.replace(_part(path), path)
        _memo(path).unlink(missing_ok=True)

    def _attempt(self, file: BinaryIO, url: str, path: Path) -> None:
        """One request that fills `file` up and verifies it. Raises _RetryError, or UserError for good."""
        have = file.seek(0, os.SEEK_END)
        memo = _read_memo(path)
        if have and memo.get("url") != url:
            self._restart(file)
            have = 0
        if not (have and memo.get("total") == have):
            memo = self._transfer(file, url, path, have, memo)
        size = file.seek(0, os.SEEK_END)
        if memo["total"] is not None and size != memo["total"]:
            if size > memo["total"]:
                self._restart(file)
            raise _RetryError(f"the connection ended after {size:,} of {memo['total']:,} bytes")
        self._verify(file, path, memo)

    def _transfer(self, file: BinaryIO, url: str, path: Path, have: int, memo: dict) -> dict:
        headers = {"Accept-Encoding": "identity"}  # lengths and ranges count the file's own bytes
        if have:
            headers["Range"] = f"bytes={have}-"
            if memo["validator"]:
                headers["If-Range"] = memo["validator"]
        auth = _Bearer(self._token) if self._token and _may_carry_token(url) else None
        try:
            with requests.get(url, headers=headers, auth=auth, stream=True, timeout=_TIMEOUT_S) as response:
                self._refuse(response, url, have, auth is not None)
                if response.status_code == 206:
                    start, total = _content_range(response)
                    if start != have or memo["total"] not in (None, total):
                        self._restart(file)
                        raise _RetryError("the file on the server has changed", 0.0)
                    memo = {**memo, "total": total}
                elif response.status_code == 416:
                    self._restart(file)
                    raise _RetryError("the server does not have the rest of the file", 0.0)
                else:
                    if have:
                        self._restart(file)
                    memo = _memo_of(response, url)
                    write_bytes(_memo(path), json.dumps(memo).encode())
                self._expect(path, memo["total"])
                for chunk in response.iter_content(_CHUNK_BYTES):
                    if self._stop.is_set():
                        raise _StoppedError
                    file.write(chunk)
                    self._progress.update(len(chunk))
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise UserError(
                    f"{_host(url)} has no certificate this machine trusts; see SSL_CERT_FILE."
                ) from error
            raise _RetryError(_explain(error, url)) from error
        except requests.RequestException as error:
            raise UserError(f"Cannot download {url} ({_reason(error)}); check the address.") from error
        finally:
            file.flush()
        return memo

    def _refuse(self, response: requests.Response, url: str, have: int, sent_token: bool) -> None:
        status = response.status_code
        if status == 200 or (status in (206, 416) and have):
            return
        if status in _TRANSIENT:
            raise _RetryError(f"the server answers {status}", _retry_after(response))
        if status in (401, 403):
            remedy = "the token in HF_TOKEN has no access to it" if sent_token else "set HF_TOKEN to a token"
            raise UserError(f"{_host(url)} refuses {url} ({status}): {remedy}.")
        if status in (404, 410):
            raise UserError(f"{url} does not exist ({status}); check the base address and the file's number.")
        raise UserError(f"{_host(url)} answers {status} to {url}; check the address.")

    def _verify(self, file: BinaryIO, path: Path, memo: dict) -> None:
        try:
            if memo["sha256"]:
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() != memo["sha256"]:
                    raise UserError("its SHA-256 is not the one the server names")
            if self._check is not None:
                self._check(_part(path))
        except UserError as error:
            self._restart(file)
            raise _RetryError(f"what arrived is not the file: {error}") from error

    def _restart(self, file: BinaryIO) -> None:
        self._progress.update(-file.seek(0, os.SEEK_END))
        file.seek(0)
        file.truncate()

    def _expect(self, path: Path, total: int | None) -> None:
        """Files of unknown length are taken to be like those known."""
        with self._lock:
            if total is not None:
                self._totals[path] = total
            if self._totals:
                mean = sum(self._totals.values()) / len(self._totals)
                self._progress.total = mean * len(self._jobs)

    def _note(self, text: str) -> None:
        with self._lock:
            self._stream.write(f"\r\x1b[K{text}\n" if is_terminal(self._stream) else f"{text}\n")
            self._stream.flush()


class _Bearer(requests.auth.AuthBase):
    """As an auth object: requests drops it on a redirect to another host and ignores ~/.netrc."""

    def __init__(self, token: str):
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


@contextmanager
def _locked(part: Path, stop: threading.Event) -> Iterator[BinaryIO]:
    """The part file, opened at its end, for this process alone; waits while another one downloads it."""
    while True:
        with open(part, "ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if stop.wait(0.5):
                    raise _StoppedError from None
                continue
            except OSError:
                pass  # a file system without locks
            if not _is_named(file, part):
                continue  # finished and renamed by another process in between
            try:
                yield file
            finally:
                if _is_named(file, part) and file.seek(0, os.SEEK_END) == 0:
                    part.unlink()
                    part.with_name(f"{part.name}.json").unlink(missing_ok=True)
            return


def _is_named(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _memo(path: Path) -> Path:
    return path.with_name(path.name + ".part.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_memo(path: Path) -> dict:
    """What is known of the bytes in the part file; empty if nothing can be said."""
    try:
        memo = json.loads(_memo(path).read_bytes())
        return memo if {"url", "total", "validator", "sha256"} <= memo.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _memo_of(response: requests.Response, url: str) -> dict:
    length = response.headers.get("Content-Length", "")
    etag = response.headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    return {
        "url": url,
        "total": int(length) if length.isdigit() else None,
        "validator": validator,
        "sha256": _linked_sha256(response),
    }


def _linked_sha256(response: requests.Response) -> str | None:
    """The hub's redirect to its storage names the SHA-256 of large files as X-Linked-ETag."""
    for answer in (*response.history, response):
        found = re.fullmatch(r'"?([0-9a-f]{64})"?', answer.headers.get("X-Linked-ETag", ""))
        if found:
            return found[1]
    return None


def _content_range(response: requests.Response) -> tuple[int, int] | tuple[None, None]:
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return (int(found[1]), int(found[2])) if found else (None, None)


def _retry_after(response: requests.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return min(float(value), _LONGEST_WAIT_S) if value.isdigit() else None


def _may_carry_token(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _explain(error: requests.RequestException, url: str) -> str:
    text = str(error)
    if "NameResolution" in text or "getaddrinfo" in text or "Name or service" in text:
        return f"the name {_host(url)} cannot be resolved, there seems to be no network"
    if isinstance(error, requests.ConnectTimeout):
        return f"{_host(url)} does not answer"
    if isinstance(error, requests.Timeout) or "Read timed out" in text:
        return f"{_host(url)} went silent"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy cannot be reached"
    if "refused" in text:
        return f"{_host(url)} refuses connections"
    return "the connection broke"


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
