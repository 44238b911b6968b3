"""One thread that works off calls from the event loop in batches.

Crossing threads is what a call on a local database costs most, so it is paid per batch: calls made in one turn of the
loop are handed over together, and all results of a batch come back with one wake-up of the loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from store.errors import UnavailableError

log = logging.getLogger(__name__)

W = TypeVar("W")


class Job(Generic[W]):
    """One call: the work, and what becomes of it. The worker sets `result` or `error`."""

    __slots__ = ("_claimed", "deadline", "error", "future", "result", "work")

    def __init__(self, work: W, future: asyncio.Future[Any], deadline: float) -> None:
        self.work = work
        self.future = future
        self.deadline = deadline
        self.result: Any = None
        self.error: Exception | None = None
        self._claimed = threading.Lock()

    def claim(self) -> bool:
        """True for the first to call it: the worker that starts it, or the loop that gives it up."""
        return self._claimed.acquire(blocking=False)


class Lane(Generic[W]):
    """A thread, its bounded queue, and the deadline of each call.

    `run` gets a list of at most `batch` claimed jobs, in the thread. A call that has not been started by its deadline
    raises UnavailableError, one that has been `late` instead.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Job[W]]], None],
        *,
        batch: int,
        limit: int,
        patience: float,
        late: type[Exception] = UnavailableError,
        finish: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._run = run
        self._finish = finish
        self._batch = batch
        self._limit = limit
        self._patience = patience
        self._late = late
        self._name = name
        self._queue: SimpleQueue[list[Job[W]] | None] = SimpleQueue()
        self._fresh: list[Job[W]] = []
        self._waiting: dict[Job[W], None] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def call(self, work: W) -> Any:
        """The worker's result for `work`. Cancelling it withdraws the work unless it has been started."""
        job = self.submit(work)
        try:
            return await job.future
        except asyncio.CancelledError:
            job.claim()
            raise

    def submit(self, work: W) -> Job[W]:
        """Queue `work`; its future tells the outcome. Raises UnavailableError if the queue is full or closed."""
        if self._closed:
            raise UnavailableError("the store is closed")
        if len(self._waiting) >= self._limit:
            raise UnavailableError(f"the store is overloaded: {self._limit} calls are waiting")
        job = Job(work, self._loop.create_future(), self._loop.time() + self._patience)
        self._waiting[job] = None
        self._fresh.append(job)
        if len(self._fresh) == 1:
            self._loop.call_soon(self._flush)
        if self._sweeper is None:
            self._sweeper = self._loop.call_at(job.deadline, self._sweep)
        return job

    async def close(self, patience: float) -> None:
        """Finish what is queued, for at most `patience` seconds, and end the thread."""
        if self._closed:
            return
        self._closed = True
        self._flush()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join, patience)
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.sleep(0)  # lets the last delivery run
        for job in list(self._waiting):
            self._fail(job, self._late if not job.claim() else UnavailableError, "the store was closed")

    def _flush(self) -> None:
        if self._fresh:
            self._queue.put(self._fresh)
            self._fresh = []

    def _sweep(self) -> None:
        self._sweeper = None
        now = self._loop.time()
        for job in list(self._waiting):
            if job.deadline > now:
                self._sweeper = self._loop.call_at(job.deadline, self._sweep)
                return
            unstarted = job.claim()
            self._fail(job, UnavailableError if unstarted else self._late, f"no answer within {self._patience} s")
            if not unstarted:
                del self._waiting[job]

    def _fail(self, job: Job[W], error: type[Exception], text: str) -> None:
        if not job.future.done():
            job.future.set_exception(error(text))

    def _deliver(self, jobs: list[Job[W]]) -> None:
        for job in jobs:
            self._waiting.pop(job, None)
            if job.future.done():
                continue
            if job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)

    def _work(self) -> None:
        try:
            while (jobs := self._take()) is not None:
                for start in range(0, len(jobs), self._batch):
                    self._work_off(jobs[start : start + self._batch])
        except RuntimeError:
            log.debug("%s: the event loop is closed", self._name)
        finally:
            self._finish()

    def _work_off(self, jobs: list[Job[W]]) -> None:
        claimed = [job for job in jobs if job.claim()]
        if claimed:
            try:
                self._run(claimed)
            except Exception as error:  # the thread's outermost loop: the callers see it, the thread lives on
                log.exception("%s failed", self._name)
                for job in claimed:
                    job.error = error
        self._loop.call_soon_threadsafe(self._deliver, jobs)

    def _take(self) -> list[Job[W]] | None:
        """All that is queued, waiting for the first; None at the end."""
        jobs = self._queue.get()
        if jobs is None:
            return None
        while True:
            try:
                more = self._queue.get_nowait()
            except Empty:
                return jobs
            if more is None:
                self._queue.put(None)
                return jobs
            jobs += more
