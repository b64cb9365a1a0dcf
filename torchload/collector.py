"""The garbage collector, paused where many objects are made and no garbage."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

__all__ = ["collector_paused"]

_lock = threading.Lock()
_pauses = 0
_was_enabled = False


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No collections while the block runs, in this thread or others.

    The collector belongs to the whole process: where blocks of several threads overlap, the last one to end starts it
    again, if it ran before the first began.
    """
    global _pauses, _was_enabled  # noqa: PLW0603 - a state of the process
    with _lock:
        if _pauses == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses = max(_pauses - 1, 0)
            if _pauses == 0 and _was_enabled:
                gc.enable()


def _start_again() -> None:
    """In a forked child: blocks of other threads don't exist here."""
    global _lock, _pauses
    if _pauses and _was_enabled:
        gc.enable()
    _lock, _pauses = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_again)
