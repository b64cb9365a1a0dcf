"""The garbage collector, paused where many objects are made and no garbage.

It belongs to the whole process: what other threads throw away meanwhile waits. So it is paused while modules are
imported, a file's index is made and a load is planned, never while data is read, nor while a stream is waited for.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TypeVar

from typing_extensions import ParamSpec

__all__ = ["collector_paused", "collector_running", "with_collector_paused"]

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")

_lock = threading.RLock()
_holders: set[int] = set()
_was_enabled = False


class collector_paused:  # noqa: N801 - used as a context manager, as if it were a function
    """No collections while the block runs, in this thread or others.

    The collector belongs to the whole process: where blocks of several threads overlap, the last one to end starts it
    again, if it ran before the first began. An interrupt at any point ends a block, at the latest with this object.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        global _was_enabled  # noqa: PLW0603 - a state of the process
        with _lock:
            if not _holders:
                _was_enabled = gc.isenabled()
            _holders.add(id(self))
            gc.disable()

    def __exit__(self, *exc: object) -> None:
        self.__del__()

    def __del__(self) -> None:
        with _lock:
            if id(self) not in _holders:
                return
            if len(_holders) == 1 and _was_enabled:
                if gc.get_freeze_count() == 0:
                    # All that was made becomes old without being looked through, which took 0.3 s of 0.6 s for 20,000
                    # tensors. Where somebody else has frozen objects, they would be thawed: then it is looked through.
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()
            _holders.discard(id(self))


@contextmanager
def collector_running() -> Iterator[None]:
    """Collections as usual while the block waits for something, although it is inside a paused one."""
    with _lock:
        is_resumed = bool(_holders) and _was_enabled
        if is_resumed:
            gc.enable()
    try:
        yield
    finally:
        with _lock:
            if is_resumed and _holders:
                gc.disable()


def with_collector_paused(function: Callable[ParamsT, ResultT]) -> Callable[ParamsT, ResultT]:
    """Let a function run in such a block, which ends when all that it made and doesn't return is gone already.

    Started again any earlier, the collector would look through all of that.
    """

    @wraps(function)
    def paused(*args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        with collector_paused():
            return function(*args, **kwargs)

    return paused


def _start_again() -> None:
    """In a forked child: blocks of other threads don't exist here."""
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()
    if _holders and _was_enabled:
        gc.enable()
    _holders.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_again)
