"""A few threads working through a list of jobs, the calling thread among them.

Whichever fails first, or is interrupted, stops the others; they are joined before the error goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

import torch

from torchload.core.threads import Helper

__all__ = ["Crew", "available_cores", "can_limit_intra_op", "intra_op_alone"]

JobT = TypeVar("JobT")

Worker = Callable[[JobT], int]
"""Does one job; returns how many bytes it moved."""
NewWorker = Callable[[], AbstractContextManager[Worker[JobT]]]
"""Makes what one thread works with; left in that thread."""


class Crew(Generic[JobT]):
    """Works through jobs, in order, with several threads.

    Attributes:
        started: The jobs that were begun; after a failure, all whose effects may be seen.
        done_bytes: What the workers have moved so far.
    """

    def __init__(
        self,
        jobs: Sequence[JobT],
        new_worker: NewWorker[JobT],
        threads: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Ready to run, in at most so many threads, each with a worker of its own; the calling one tells progress."""
        self.started: list[JobT] = []
        self._queue = deque(jobs)
        self._new_worker = new_worker
        self._helpers = [Helper(partial(self._help, slot)) for slot in range(1, min(threads, len(self._queue)))]
        self._done = [0] * (len(self._helpers) + 1)
        self._errors: list[BaseException] = []
        self._on_progress = on_progress

    @property
    def done_bytes(self) -> int:
        return sum(self._done)

    def run(self) -> None:
        """Do all jobs.

        Raises:
            BaseException: What the first worker that failed raised, or `on_progress`, or a KeyboardInterrupt.
        """
        failure: BaseException | None = None
        is_over = False
        intra_op = _IntraOp()
        try:
            intra_op.limit()
            for helper in self._helpers:
                try:
                    helper.start()
                except RuntimeError:  # no more threads to be had: work with those there are
                    break
            self._work(0)
        except BaseException as error:  # noqa: BLE001 - raised again once all have stopped
            failure = error
        # From here on nothing is called outside of a `try`: an interrupt there would leave threads that write.
        while not is_over:
            try:
                if failure is not None:
                    self._fail(failure)
                for helper in self._helpers:
                    helper.join()
                intra_op.restore()
                is_over = True
            except BaseException as error:  # noqa: BLE001 - interrupted while waiting
                failure = error
        try:
            if self._errors:
                raise self._errors[0]
            if self._on_progress is not None:
                self._on_progress(self.done_bytes)
        finally:
            del failure  # its traceback holds this frame
            self._errors.clear()  # and those of others their workers'

    def _help(self, slot: int) -> None:
        try:
            _IntraOp().limit()
            self._work(slot)
        except BaseException as error:  # noqa: BLE001 - raised again once all have stopped
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._queue.clear()

    def _work(self, slot: int) -> None:
        # Inference mode, since it is the one mode in which both ordinary and inference tensors can be written to.
        with torch.inference_mode(), self._new_worker() as worker:
            while not self._errors:
                try:
                    job = self._queue.popleft()
                except IndexError:
                    return
                self.started.append(job)
                self._done[slot] += worker(job)
                if slot == 0 and self._on_progress is not None:
                    self._on_progress(self.done_bytes)


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _IntraOp:
    """Has the operators of the calling thread run in this thread alone.

    They would share cores that have work, and in the child of a process that has used OpenMP's threads an operator that
    wants several waits for ever. `torch.set_num_threads` would also set what every later thread of the process starts
    with; here the calling thread's number is set, by OpenMP's own function. MKL's is asked too: once somebody has
    called `torch.set_num_threads`, it no longer heeds OpenMP's.
    """

    def __init__(self) -> None:
        self._omp: int | None = None
        self._mkl: list[int] = []

    def limit(self) -> None:
        """Begin."""
        if (set_threads := _omp_set_num_threads()) is not None:
            self._omp = torch.get_num_threads()
            set_threads(1)
        if (set_threads := _mkl_set_num_threads()) is not None:
            self._mkl.extend(map(set_threads, (1,)))  # noted before an interrupt can come

    def restore(self) -> None:
        """Set back what was; to be called again after an interrupt."""
        if self._mkl:
            _mkl_set_num_threads()(self._mkl[0])
        if self._omp is not None:
            _omp_set_num_threads()(self._omp)


@contextlib.contextmanager
def intra_op_alone() -> Iterator[None]:
    """Operators run in the calling thread alone while the block runs; in workers they always do."""
    intra_op = _IntraOp()
    try:
        intra_op.limit()
        yield
    finally:
        intra_op.restore()


def can_limit_intra_op() -> bool:
    """Whether threads can be kept from starting intra-op threads of their own."""
    return _omp_set_num_threads() is not None


@lru_cache(maxsize=1)
def _omp_set_num_threads() -> Any:
    """OpenMP's ``omp_set_num_threads``, if it is the one that torch obeys."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        set_threads = ctypes.CDLL(None).omp_set_num_threads
        set_threads.argtypes = (ctypes.c_int,)
        set_threads.restype = None
        before = torch.get_num_threads()
        try:
            set_threads(before + 1)
            obeyed = torch.get_num_threads() == before + 1
        finally:
            set_threads(before)
        if obeyed:
            return set_threads
    return None


@lru_cache(maxsize=1)
def _mkl_set_num_threads() -> Any:
    """MKL's function for the calling thread, which returns what was, if torch was built with it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        set_threads = library.MKL_Set_Num_Threads_Local
        set_threads.argtypes = (ctypes.c_int,)
        set_threads.restype = ctypes.c_int
        return set_threads
    return None
