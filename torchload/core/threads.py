"""Threads of which an interrupt leaves no doubt whether they run."""

from __future__ import annotations

import _thread
from collections.abc import Callable

__all__ = ["Helper"]


class Helper:
    """A thread that is over when `join` returns; it ends with the process.

    `threading.Thread` is started and waited for through conditions written in Python. An interrupt inside them hides
    whether the thread runs, or comes out as "RuntimeError: release unlocked lock". Here each is one call into C.
    """

    def __init__(self, target: Callable[[], object]) -> None:
        """A thread for what doesn't raise."""
        self._target = target
        self._started: list[int] = []
        self._is_over = False
        self._end = _thread.allocate_lock()
        self._end.acquire()

    def start(self) -> None:
        """Start it.

        Raises:
            RuntimeError: No more threads are to be had.
        """
        self._started.extend(map(_thread.start_new_thread, (self._run,), ((),)))  # noted before an interrupt can come

    def join(self) -> None:
        """Wait until it is over, if it was started; to be called again after an interrupt."""
        while self._started and not self._is_over:
            self._end.acquire()

    def _run(self) -> None:
        try:
            self._target()
        finally:
            del self._target  # and with it what it worked on, which often holds this helper
            self._is_over = True
            self._end.release()
