"""Threads that run Python, whichever way they were started, and those that a forked child lacks."""

from __future__ import annotations

import sys
import time

__all__ = ["CHILD_IS_WAITED_FOR", "python_threads"]


def python_threads() -> int:
    """How many there are; one whose work is done and that is about to end isn't counted."""
    counts = []
    for _ in range(50):
        counts.append(len(sys._current_frames()))
        if counts[-1] == 1:
            break
        time.sleep(0.001)
    return min(counts)


CHILD_IS_WAITED_FOR = """
import os, signal, sys, time
for _ in range(600):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.05)
os.kill(child, signal.SIGKILL)
sys.exit("the child waits for ever")
"""
"""The end of a script that has forked a `child`: it ends as that does, which may wait for threads that it lacks."""
