"""Writes pickles that no pickler would, and reads them where they can do no harm."""

from __future__ import annotations

import gc
import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable

import pytest

from torchload.errors import TorchLoadError

SECONDS = 20  # the promise is 5 on a machine of one's own; a shared one may pause
MEMORY_BYTES = 256 << 20

PROTO = b"\x80\x02"
STOP = b"."


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def contained(action: Callable[[], object]) -> str:
    """What an action comes to in a process of its own, which may take `SECONDS` and `MEMORY_BYTES` more than it has.

    Returns:
        ``"done"``, or the text of the `TorchLoadError` that it raised. Anything else fails the test: another exception,
        a crash, too much memory, too much time.
    """
    if not hasattr(os, "fork") or not os.path.exists("/proc/self/statm"):
        pytest.skip("needs fork and /proc")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            _limit()
            gc.disable()  # as `open_checkpoint` does
            try:
                action()
                outcome = "done"
            except TorchLoadError as error:
                outcome = str(error)
            os.write(writer, outcome.encode(errors="replace")[:4096])
            status = 0
        except BaseException:  # noqa: BLE001 - a forked child must not run on
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        outcome = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        pytest.fail(f"ended by signal {signal.Signals(os.WTERMSIG(status)).name}")
    assert os.WEXITSTATUS(status) == 0, "ended with an exception that is no TorchLoadError, or out of memory"
    return outcome


def _limit() -> None:
    import resource

    with open("/proc/self/statm") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, in_use + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
