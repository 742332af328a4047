"""A worker: one daemon thread that carries out jobs for an owner which it does not keep alive."""

import queue
import threading
import weakref
from collections.abc import Callable


class Worker:
    """Calls `run(owner, job)` for each job, one after the other. The thread is made at the first job.

    It ends with its owner, or at `end`; `stop` is set then, so that a job which looks at it ends early.
    """

    def __init__(self, owner: object, run: Callable, stop: threading.Event, name: str):
        self._owner, self._run, self._stop, self._name = weakref.ref(owner), run, stop, name
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def put(self, job: object) -> None:
        if self.thread is None:
            self.thread = threading.Thread(
                target=_work, args=(self._jobs, self._owner, self._run), name=self._name, daemon=True
            )
            self.thread.start()
            # also runs at exit: a thread inside torch must not outlive the interpreter
            weakref.finalize(self._owner(), _end, self.thread, self._jobs, self._stop)
        self._jobs.put(job)

    def end(self, timeout: float) -> None:
        """No further job; waits for the present one."""
        self._jobs.put(None)
        if self.thread and self.thread is not threading.current_thread():
            self.thread.join(timeout)


def _work(jobs: queue.SimpleQueue, ref: weakref.ref, run: Callable) -> None:
    while (job := jobs.get()) is not None:
        owner = ref()
        if owner is None:
            return
        run(owner, job)
        del owner, job


def _end(thread: threading.Thread, jobs: queue.SimpleQueue, stop: threading.Event) -> None:
    stop.set()
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(2.0)
