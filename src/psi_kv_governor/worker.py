"""Threads that do what others ask for, so that no Ctrl-C can split it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar, cast

_T = TypeVar("_T")


class _Task(Generic[_T]):
    """Something to do, and what became of it."""

    def __init__(self, action: Callable[[], _T]) -> None:
        self._action: Callable[[], _T] | None = action
        self._result: _T | None = None
        self._error: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        action, self._action = self._action, None  # what it holds goes with the task
        assert action is not None
        try:
            self._result = action()
        except BaseException as error:
            self._error = error
        self._done.release()

    def wait(self) -> _T:
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return cast(_T, self._result)


class Worker:
    """Carries actions out in threads of its own, in the order in which they come, `threads` at a time.

    Python raises KeyboardInterrupt in the main thread alone, between any two of its steps: also in the
    release of a lock, which is closed for ever then. Between the caller and these threads there are only a
    queue and a lock that are written in C, and neither can be split. `concurrent.futures` is no choice: its
    semaphore is written in Python.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        self._tasks: SimpleQueue[_Task[object] | None] = SimpleQueue()
        self._closing = False
        self._threads: list[threading.Thread] = []
        with contextlib.suppress(RuntimeError):  # TasksMax=, RLIMIT_NPROC: who asks does it himself, then
            for _ in range(threads):
                thread = threading.Thread(target=_work, args=(self._tasks,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        self._idents = frozenset(thread.ident for thread in self._threads)
        self._end = weakref.finalize(self, _tell_to_end, self._tasks, threads)  # also when it is only dropped
        # Not at the exit of Python: what is closed there still needs its threads.
        self._end.atexit = False

    @property
    def inside(self) -> bool:
        """Whether this is called by one of its threads: who waits for another action there may wait for
        itself."""
        return threading.get_ident() in self._idents

    def do(self, action: Callable[[], _T]) -> _T:
        """Carry `action` out and give what it gives, or raise what it raises."""
        if not self._idents:
            return action()
        task = _Task(action)
        self._tasks.put(cast("_Task[object]", task))
        if self._closing:  # else it stands before the end of the queue
            self.close()
        return task.wait()

    def close(self) -> None:
        """Have the threads end after what they were asked for before, and wait for it. Safe to call twice,
        and in one of them, which then is not waited for."""
        self._closing = True
        _tell_to_end(self._tasks, len(self._idents))  # more than once does no harm
        while self._threads:
            # Out of the list first: the lock of one whose join was interrupted may stay closed.
            thread = self._threads.pop()
            if thread is not threading.current_thread():
                thread.join()
        if not self.inside:
            self._finish()

    def _finish(self) -> None:
        """Do what came too late for the threads."""
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                return
            if task is not None:
                task.run()

    def abandon(self) -> None:
        """In a forked child: the threads did not come along."""
        self._end.detach()
        self._threads, self._idents = [], frozenset()


def _work(tasks: SimpleQueue[_Task[object] | None]) -> None:
    while (task := tasks.get()) is not None:
        task.run()
        del task  # while it waits for the next, it keeps nothing alive


def _tell_to_end(tasks: SimpleQueue[_Task[object] | None], threads: int) -> None:
    for _ in range(threads):
        tasks.put(None)
