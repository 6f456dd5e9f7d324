"""One thread that owns the device: every request takes its turn there, a step at a time.

A `Job` is a request that goes on for many steps (an answer, a long text); a call is something short between two steps.
Jobs advance in a circle, one step each. What a job says waits in its outbox, which is small: while a client takes
nothing in, its job stands still, and after `patience` seconds it is dropped.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from megacontext_jax.errors import UserError
from megacontext_jax.infer.server.errors import INTERNAL, STOPPING, Refused

OUTBOX = 32  # messages of a job that may wait for its client
POLL = 0.25  # seconds between two looks at clients that take nothing in

log = logging.getLogger("megacontext_jax.server")

Message = dict[str, Any]
Steps = Iterator[list[Message]]  # each `next` takes the device for a moment and gives what is to be said


class Job:
    """Made by `Scheduler.submit` on the event loop, which reads `messages`; the thread advances it."""

    def __init__(self, make: Callable[[], Steps], changed: threading.Condition):
        self._make = make
        self._steps: Steps | None = None
        self._changed = changed  # guards everything below
        self._outbox: deque[Message] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._full_since: float | None = None
        self.cancelled: Exception | None = None

    # --- on the event loop ---

    async def messages(self) -> AsyncIterator[Message]:
        """What the job says, in order. Raises Refused or UserError where it failed."""
        while True:
            with self._changed:
                message = self._outbox.popleft() if self._outbox else None
                if message is not None:
                    if self._full_since is not None:
                        self._full_since = None
                        self._changed.notify_all()
                elif self._ended:
                    if self._error:
                        raise self._error
                    return
                else:
                    self._woken.clear()
            if message is None:
                await self._woken.wait()
            else:
                yield message

    def cancel(self, why: Exception | None = None) -> None:
        """Ends the job before its next step; what is done of it stays done."""
        with self._changed:
            if not self._ended and not self.cancelled:
                self.cancelled = why or Refused(499, "The client has gone.")
                self._changed.notify_all()

    # --- on the thread ---

    def is_blocked(self, patience: float) -> bool:
        """Whether its client must take something in first. Cancels the job of one that never does."""
        if self.cancelled or len(self._outbox) < OUTBOX:
            return False
        now = time.monotonic()
        self._full_since = self._full_since or now
        if now - self._full_since > patience:
            self.cancelled = Refused(408, f"The client took nothing in for {patience:g} seconds.")
        return self.cancelled is None

    def step(self) -> bool:
        """One step; whether there may be more."""
        try:
            if self.cancelled:
                raise self.cancelled
            if self._steps is None:
                self._steps = self._make()
            messages = next(self._steps)
        except StopIteration:
            return self.end(None)
        except (UserError, Refused) as error:
            return self.end(error)
        except Exception:
            log.exception("A request failed.")
            return self.end(Refused(500, INTERNAL))
        with self._changed:
            self._outbox.extend(messages)
        if messages:
            self._wake()
        return True

    def end(self, error: Exception | None) -> bool:
        """Nothing more is said; False."""
        try:
            if self._steps is not None and hasattr(self._steps, "close"):
                self._steps.close()
        except Exception as failure:
            log.exception("A request could not be ended in order.")
            error = error or failure
        with self._changed:
            self._ended, self._error, self._steps = True, error, None
        self._wake()
        return False

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._woken.set)


class Scheduler:
    """The thread and its circle of jobs. `opening` and `closing` are the first and the last it does."""

    def __init__(
        self,
        *,
        max_running: int,
        max_waiting: int,
        patience: float,
        opening: Callable[[], None] = lambda: None,
        closing: Callable[[], None] = lambda: None,
    ):
        self._changed = threading.Condition(threading.RLock())
        self._running: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable, asyncio.Future, asyncio.AbstractEventLoop]] = deque()
        self._max_running, self._max_waiting = max_running, max_waiting
        self._patience = patience
        self._opening, self._closing = opening, closing
        self._stopping = False
        self._stepping = False  # a job has been taken out of the circle for its step
        self.ready = False  # the opening is done, and the thread alive
        self.failure: BaseException | None = None  # what the thread died of
        self.when_dead: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._live, name="device", daemon=True)

    @property
    def counts(self) -> tuple[int, int]:
        """(jobs that take turns, jobs that wait for a place)."""
        with self._changed:
            return len(self._running) + self._stepping, len(self._waiting)

    # --- on the event loop ---

    def start(self) -> None:
        self._thread.start()

    def submit(self, make: Callable[[], Steps]) -> Job:
        """A job that joins the circle, or waits for a place in it. Refused if too many wait."""
        with self._changed:
            self._check_open()
            if sum(self.counts) >= self._max_running + self._max_waiting:
                raise Refused(
                    503, f"{len(self._waiting)} requests are waiting already; try again in a moment."
                )
            job = Job(make, self._changed)
            self._waiting.append(job)
            self._changed.notify_all()
            return job

    async def call(self, function: Callable, *args) -> Any:
        """What `function` gives, called between two steps; for what takes a moment."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._changed:
            self._check_open()
            self._calls.append((lambda: function(*args), future, loop))
            self._changed.notify_all()
        return await future

    def stop(self) -> None:
        """Ends all jobs; new ones are refused. Returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def close(self, seconds: float = 30.0) -> None:
        """Stops, and waits until the thread has put everything away, or `seconds` have passed."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _check_open(self) -> None:
        if self._stopping:
            raise Refused(503, STOPPING)

    # --- on the thread ---

    def _live(self) -> None:
        try:
            self._opening()
            self.ready = True
            while not self._stopping:
                self._turn()
        except BaseException as error:
            self.failure = error
        finally:
            self.ready = False
            self._put_away()
            self.when_dead()

    def _turn(self) -> None:
        """At most one call and one step."""
        with self._changed:
            job = self._next()
            if job is None and not self._calls and not self._stopping:
                self._changed.wait(POLL if self._running else None)
                return
            call = self._calls.popleft() if self._calls else None
            self._stepping = job is not None
        if call:
            self._answer_call(*call)
        goes_on = job is not None and job.step()
        with self._changed:
            self._stepping = False
            if goes_on:
                self._running.append(job)

    def _next(self) -> Job | None:
        """The job whose turn it is, taken out of the circle."""
        while self._waiting and len(self._running) < self._max_running:
            self._running.append(self._waiting.popleft())
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            job.end(job.cancelled)
        for _ in range(len(self._running)):
            job = self._running.popleft()
            if not job.is_blocked(self._patience):
                return job
            self._running.append(job)
        return None

    @staticmethod
    def _answer_call(function: Callable, future: asyncio.Future, loop: asyncio.AbstractEventLoop) -> None:
        result, error = None, None
        try:
            result = function()
        except (UserError, Refused) as refusal:
            error = refusal
        except Exception:
            log.exception("A request failed.")
            error = Refused(500, INTERNAL)
        _tell(future, loop, result, error)

    def _put_away(self) -> None:
        with self._changed:
            self._stopping = True
            jobs, calls = [*self._running, *self._waiting], [*self._calls]
            self._running.clear()
            self._waiting.clear()
            self._calls.clear()
        for job in jobs:
            job.end(Refused(503, STOPPING))
        for _, future, loop in calls:
            _tell(future, loop, None, Refused(503, STOPPING))
        try:
            self._closing()
        except Exception:
            log.exception("Not every conversation could be saved.")


def _tell(future: asyncio.Future, loop: asyncio.AbstractEventLoop, result, error) -> None:
    def tell() -> None:
        if not future.done():
            future.set_exception(error) if error else future.set_result(result)

    if not loop.is_closed():
        loop.call_soon_threadsafe(tell)
